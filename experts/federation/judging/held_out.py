"""Loss of a delivered expert on public text, compared with the seed's.

Usage: `python -m expertctl.experts.federation.judging.held_out ROOT SEED EXPERT`. Models are loaded in a separate process, so that
the receiving process stays small.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ....core.artefacts.files import read_json, write_json
from ....core.artefacts.layout import Layout
from ....core.config.project import load_project
from ....core.config.settings import ProjectConfig
from ....core.errors import UserError
from ....core.manifests.manifest import read_manifest
from ....core.models.loading import load_network, max_positions, require_intact_models, tokenizer_folder
from ....core.models.scoring import total_loss
from ....core.process.compute import best_device
from ....core.process.environment import prepare_libraries
from ....core.text.token_store import TokenBlocks
from ...text.corpora import domain_config, prepare_domain
from .acceptance import HeldOut, Measure

BLOCKS = 64
"""Maximum number of blocks scored of each public text; enough to detect forgetting."""


def held_out_measure(layout: Layout) -> Measure:
    """Return a function that measures models on the workspace's public text: the seed's domains, or all domains.

    The function returns None without public text; the bound is then not checked.
    """

    def measure(seed: Path, folder: Path) -> HeldOut | None:
        if not public_domains(layout, load_project(layout.config_file)):
            return None
        command = [sys.executable, "-P", "-m", __name__, str(layout.root), str(seed), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if result.returncode != 0:  # caused by the seed or the machine, not by the expert
            reason = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
            raise UserError(f"public text cannot be scored, so no delivery can be judged: {reason}")
        content = json.loads(result.stdout.splitlines()[-1])
        return HeldOut(content["seed"], float("nan") if content["expert"] is None else content["expert"])

    return measure


def public_domains(layout: Layout, project: ProjectConfig) -> tuple[str, ...]:
    """Return the configured domains that the seed was made from; if there are none, all configured domains."""
    made_from = read_manifest(layout.seed).domains
    known = tuple(name for name in project.domains if name in made_from)
    return known or tuple(project.domains)


def main(arguments: list[str]) -> int:
    """Print both losses as JSON (null for an expert that cannot be loaded); return the exit status."""
    prepare_libraries()
    layout, seed, folder = Layout(Path(arguments[0])), Path(arguments[1]), Path(arguments[2])
    try:
        text = _public_text(layout, load_project(layout.config_file), seed)
        seed_loss = _loss_of_seed(layout, seed, text)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        expert_loss: float | None = loss_on(folder, text)
    except UserError as error:
        print(error, file=sys.stderr)
        expert_loss = None
    print(json.dumps({"seed": seed_loss, "expert": expert_loss}))
    return 0


def _public_text(layout: Layout, project: ProjectConfig, seed: Path) -> dict[str, TokenBlocks]:
    """Return the validation text of the public domains, by name."""
    size = min(project.training.sequence_length, max_positions(seed))
    blocks = {}
    for name in public_domains(layout, project):
        prepared = prepare_domain(layout, name, domain_config(project, name), tokenizer_folder(seed))
        blocks[name] = TokenBlocks(prepared.open("valid"), size)
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
            total, count = total_loss(model, (blocks.block(index)[None] for index in indices.tolist()), model.device)
            losses.append(total / max(count, 1))
    return sum(losses) / len(losses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
