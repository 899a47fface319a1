"""How well a delivered expert does on public text, beside the seed: `python -m expertctl.experts.federation.held_out ROOT SEED EXPERT`.

Models are loaded in a process of their own, so that whoever receives deliveries stays small.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ...core.config import ProjectConfig, load_project
from ...core.environment import prepare_libraries
from ...core.errors import UserError
from ...core.lineage import read_manifest
from ...core.workspace import Layout
from .acceptance import HeldOut, Measure

METRIC = "bits_per_byte"


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
    project = load_project(layout.config_file)
    try:
        base = _loss(layout, project, seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        own: float | None = _loss(layout, project, folder)
    except UserError as error:
        print(error, file=sys.stderr)
        own = None
    print(json.dumps({"seed": base, "expert": own}))
    return 0


def _loss(layout: Layout, project: ProjectConfig, folder: Path) -> float:
    from ..evaluation import evaluate

    return evaluate(layout, project, {"model": folder}, public_domains(layout, project), jobs=1).mean(
        "model", METRIC
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
