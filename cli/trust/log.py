"""`expertctl log`: show the lineage of all artefacts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..context import Session, pass_session
from ..group import cli_command
from ..output import short
from ..summaries import origin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...core.manifests.manifest import Manifest, Parent


@cli_command("log", example="expertctl log")
@pass_session
def command(session: Session) -> None:
    """Show the lineage of the seed, experts and generalists."""
    from ...core.manifests.manifest import read_manifest

    manifests = [read_manifest(folder) for folder in session.open().layout.finished()]
    content = {
        "nodes": [_node(manifest) for manifest in manifests],
        "edges": [
            {"from": parent.digest, "to": manifest.digest, "name": parent.name, "weight": parent.weight}
            for manifest in manifests
            for parent in manifest.parents
        ],
    }
    lines = _tree(manifests) or ["no finished artefacts yet; start with `expertctl seed`"]
    session.finish(content, "\n".join(lines))


def _node(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "kind": manifest.kind,
        "digest": manifest.digest,
        "method": manifest.method,
        "trains": manifest.trainable,
        "domains": list(manifest.domains),
    }


def _tree(manifests: Sequence[Manifest]) -> list[str]:
    """Return the lines of the tree: the seed with its experts, then each generalist with its parents."""
    current_digests = {manifest.name: manifest.digest for manifest in manifests}
    lines: list[str] = []
    for manifest in manifests:
        if manifest.kind == "seed":
            lines.append(f"seed  {short(manifest.digest)}  {origin(manifest)}")
            lines += _branches([_expert(expert, current_digests) for expert in manifests if expert.kind == "expert"])
    for manifest in manifests:
        if manifest.kind == "generalist":
            lines += ["", f"{manifest.name}  {short(manifest.digest)}  generalist, {manifest.method}"]
            members = [parent for parent in manifest.parents if parent.kind != "seed"]
            lines += _branches([_parent(parent, current_digests) for parent in members])
    return lines


def _branches(items: Sequence[str]) -> list[str]:
    return [f"{'└──' if index == len(items) else '├──'} {item}" for index, item in enumerate(items, start=1)]


def _expert(manifest: Manifest, current_digests: dict[str, str]) -> str:
    expert_parents = [parent for parent in manifest.parents if parent.kind == "expert"]
    starts = [
        f"{parent.name} {parent.weight or 0:.2f}{_staleness(parent, current_digests)}" for parent in expert_parents
    ]
    start = f", from {', '.join(starts)}" if starts else ""
    seed = next((parent for parent in manifest.parents if parent.kind == "seed"), None)
    seed_note = ""
    if seed is not None and seed.digest != current_digests.get("seed"):
        seed_note = f"  (from another seed, {short(seed.digest)})"
    return f"{manifest.name}  {short(manifest.digest)}  {origin(manifest)}{start}{seed_note}"


def _parent(parent: Parent, current_digests: dict[str, str]) -> str:
    weight = f"  {parent.weight:.3f}" if parent.weight is not None else ""
    return f"{parent.name}  {short(parent.digest)}{weight}{_staleness(parent, current_digests)}"


def _staleness(parent: Parent, current_digests: dict[str, str]) -> str:
    """Return a note if a parent was deleted or replaced since, else an empty string."""
    if parent.name not in current_digests:
        return " (deleted)"
    return "" if current_digests[parent.name] == parent.digest else " (replaced since)"
