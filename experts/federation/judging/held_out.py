"""How well a delivered expert does on public text, beside the seed: `python -m expertctl.experts.federation.judging.held_out ROOT SEED EXPERT`.

Models are loaded in a process of their own, so that whoever receives deliveries stays small.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ....core.artefacts.files import read_json, write_json
from ....core.artefacts.layout import Layout
from ....core.artefacts.lineage import read_manifest
from ....core.config.project import load_project
from ....core.config.settings import ProjectConfig
from ....core.errors import UserError
from ....core.models.loading import load_network, max_positions, require_intact_models, tokenizer_folder
from ....core.models.scoring import token_log_probs
from ....core.process.compute import best_device
from ....core.process.environment import prepare_libraries
from ....core.text.token_store import TokenBlocks
from ...text.corpora import domain_config, prepare_domain
from .acceptance import HeldOut, Measure

BLOCKS = 64
"""Of each public text: enough to tell a model that has forgotten from one that has not, whatever the text's size."""


def held_out_measure(layout: Layout) -> Measure:
    """Return what measures models on the workspace's public text: the seed's own domains, or all there are.

    Where there is no text it returns None, and the bound is not checked.
    """

    def measure(seed: Path, folder: Path) -> HeldOut | None:
        if not public_domains(layout, load_project(layout.config_file)):
            return None
        command = [sys.executable, "-P", "-m", __name__, str(layout.root), str(seed), str(folder)]
        found = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if found.returncode != 0:  # of the seed or the machine; it says nothing of the expert
            reason = (found.stderr.strip().splitlines() or [f"status {found.returncode}"])[-1]
            raise UserError(f"public text cannot be scored, so no delivery can be judged: {reason}")
        content = json.loads(found.stdout.splitlines()[-1])
        return HeldOut(content["seed"], float("nan") if content["expert"] is None else content["expert"])

    return measure


def public_domains(layout: Layout, project: ProjectConfig) -> tuple[str, ...]:
    """Return the domains that a seed was made from, as far as they are here; else all that were not discovered."""
    made_from = read_manifest(layout.seed).data.get("domains", {})
    known = tuple(name for name in project.domains if name in made_from)
    return known or tuple(project.domains)


def main(arguments: list[str]) -> int:
    """Print both losses as JSON, that of an expert that cannot be loaded as null; return the exit status."""
    prepare_libraries()
    layout, seed, folder = Layout(Path(arguments[0])), Path(arguments[1]), Path(arguments[2])
    try:
        text = _public_text(layout, load_project(layout.config_file), seed)
        base = _loss_of_seed(layout, seed, text)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        own: float | None = loss_on(folder, text)
    except UserError as error:
        print(error, file=sys.stderr)
        own = None
    print(json.dumps({"seed": base, "expert": own}))
    return 0


def _public_text(layout: Layout, project: ProjectConfig, seed: Path) -> dict[str, TokenBlocks]:
    """Return the validation text of the public domains, by name."""
    size = min(project.training.sequence_length, max_positions(seed))
    found = {}
    for name in public_domains(layout, project):
        prepared = prepare_domain(layout, name, domain_config(project, name), tokenizer_folder(seed))
        found[name] = TokenBlocks(prepared.open("valid"), size)
    return found


def _loss_of_seed(layout: Layout, seed: Path, text: Mapping[str, TokenBlocks]) -> float:
    """Return a seed's loss, which is kept: it is the same for every delivery."""
    of_text = {name: (blocks.store.part.digest, blocks.block_size) for name, blocks in text.items()}
    what = json.dumps([read_manifest(seed).digest, of_text, BLOCKS], sort_keys=True)
    kept = layout.root / "federation" / "held-out.json"
    if kept.is_file() and (content := read_json(kept)).get("of") == what:
        return float(content["loss"])
    loss = loss_on(seed, text)
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(kept, {"of": what, "loss": loss})
    return loss


def loss_on(folder: Path, text: Mapping[str, TokenBlocks]) -> float:
    """Return a model's mean loss, nats per token, on at most `BLOCKS` blocks of each text, evenly spread; texts count the same.

    Raises `UserError` for a folder that is no sound model.
    """
    import numpy as np
    import torch

    require_intact_models([folder])
    model = load_network(folder, dtype="float32").to(best_device())
    losses = []
    with torch.inference_mode():
        for blocks in text.values():
            total, count = 0.0, 0
            whole = len(blocks)  # a text of less than one block is one that is shorter
            places = np.unique(np.linspace(0, max(whole - 1, 0), min(BLOCKS, max(whole, 1))).astype(int))
            for place in places.tolist():
                scores = token_log_probs(model, torch.from_numpy(blocks.block(place)[None]).to(model.device))
                total -= float(scores.double().sum())
                count += scores.numel()
            losses.append(total / max(count, 1))
    return sum(losses) / len(losses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
