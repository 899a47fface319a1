"""Loss of a delivered expert on public text, compared with the seed's; `python -m expertctl.experts.federation.judging.held_out ROOT`.

The process reads `["SEED", "EXPERT"]`, two folders, from each line of its standard input, and prints a line of JSON:
`{"seed": LOSS, "expert": LOSS}`, null for an expert that cannot be loaded, or `{"error": REASON}`. It ends with its input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....core.artefacts.files import read_json, write_json
from ....core.artefacts.layout import Layout
from ....core.config.project import load_project
from ....core.config.settings import ProjectConfig
from ....core.errors import UserError, first_line
from ....core.manifests.manifest import read_manifest
from ....core.models.adapters.prompts import num_prompt_tokens
from ....core.models.loading import load_network, max_positions, require_intact_models, tokenizer_folder
from ....core.models.scoring import total_loss
from ....core.process.compute import best_device
from ....core.process.environment import prepare_libraries
from ....core.text.conversation_blocks import blocks_of
from ....core.text.token_store import TokenBlocks
from ...text.corpora import domain_config, prepare_domain

BLOCKS = 64
"""Maximum number of blocks scored of each public text; enough to detect forgetting."""


def public_domains(layout: Layout, project: ProjectConfig) -> tuple[str, ...]:
    """Return the configured domains that the seed was made from; if there are none, all configured domains."""
    made_from = read_manifest(layout.seed).domains
    known = tuple(name for name in project.domains if name in made_from)
    return known or tuple(project.domains)


def main(arguments: list[str]) -> int:
    """Answer every line of standard input until its end; return the exit status."""
    prepare_libraries()
    layout = Layout(Path(arguments[0]))
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    for line in sys.stdin:
        seed, folder = map(Path, json.loads(line))
        print(json.dumps(answer(layout, seed, folder)), file=answers, flush=True)
    return 0


def answer(layout: Layout, seed: Path, folder: Path) -> dict[str, Any]:
    """Return both losses, None for an expert that cannot be loaded, or the error that keeps the seed from being scored."""
    try:
        text = _public_text(layout, load_project(layout.config_file), seed, num_prompt_tokens(folder))
        seed_loss = _loss_of_seed(layout, seed, text)
    except UserError as error:  # caused by the seed or the machine, not by the expert
        return {"error": first_line(error)}
    try:
        return {"seed": seed_loss, "expert": loss_on(folder, text)}
    except UserError as error:
        print(error, file=sys.stderr)
        return {"seed": seed_loss, "expert": None}


def _public_text(layout: Layout, project: ProjectConfig, seed: Path, prompt: int = 0) -> dict[str, TokenBlocks]:
    """Return the validation text of the public domains, by name, in blocks that leave room for a prompt of that length."""
    size = min(project.training.sequence_length, max_positions(seed) - prompt)
    blocks = {}
    for name in public_domains(layout, project):
        prepared = prepare_domain(layout, name, domain_config(project, name), tokenizer_folder(seed))
        blocks[name] = blocks_of(prepared.open("valid"), size)
    return blocks


def _loss_of_seed(layout: Layout, seed: Path, text: Mapping[str, TokenBlocks]) -> float:
    """Return the seed's loss, from a cache file if the seed and the text are unchanged."""
    digests = {name: (blocks.store.part.digest, blocks.block_size) for name, blocks in text.items()}
    cache_key = json.dumps([read_manifest(seed).digest, digests, BLOCKS], sort_keys=True)
    cache = layout.root / "federation" / "held-out.json"
    if cache.is_file() and (content := read_json(cache)).get("of") == cache_key:
        return float(content["loss"])
    loss = loss_on(seed, text)
    cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(cache, {"of": cache_key, "loss": loss})
    return loss


def loss_on(folder: Path, text: Mapping[str, TokenBlocks]) -> float:
    """Return a model's loss in nats per token: the unweighted mean over texts, each scored on up to `BLOCKS` evenly spaced blocks.

    Raises `UserError` for a folder without an intact model.
    """
    import numpy as np
    import torch

    require_intact_models([folder])
    model = load_network(folder, dtype="float32").to(best_device())
    losses = []
    with torch.inference_mode():
        for blocks in text.values():
            num_blocks = max(len(blocks), 1)  # a text shorter than a block still has one short block
            indices = np.unique(np.linspace(0, num_blocks - 1, min(BLOCKS, num_blocks)).astype(int))
            total, count = total_loss(model, map(blocks.window, indices.tolist()))
            losses.append(total / max(count, 1))
    return sum(losses) / len(losses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
