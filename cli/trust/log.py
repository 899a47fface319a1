"""`expertctl log`: what came from what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..context import Session, pass_session
from ..group import cli_command
from ..output import short
from ..summaries import origin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...core.artefacts.lineage import Manifest, Parent


@cli_command("log", example="expertctl log")
@pass_session
def command(session: Session) -> None:
    """Show what came from what: seed, experts, generalists."""
    from ...core.artefacts.lineage import read_manifest

    manifests = [read_manifest(folder) for folder in session.open().layout.finished()]
    content = {
        "nodes": [_node(one) for one in manifests],
        "edges": [edge for one in manifests for edge in _edges(one)],
    }
    lines = _tree(manifests) or ["nothing is finished yet; begin with `expertctl seed`"]
    session.finish(content, "\n".join(lines))


def _node(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "kind": manifest.kind,
        "digest": manifest.digest,
        "method": manifest.config.get("method"),
        "trains": manifest.trainable,
        "domains": list(manifest.data.get("domains", {})) if manifest.kind != "generalist" else [],
    }


def _edges(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {"from": parent.digest, "to": manifest.digest, "name": parent.name, "weight": parent.weight}
        for parent in manifest.parents
    ]


def _tree(manifests: Sequence[Manifest]) -> list[str]:
    """Return the seed with its experts below, then each generalist with what it was made of."""
    now = {manifest.name: manifest.digest for manifest in manifests}
    lines: list[str] = []
    for manifest in manifests:
        if manifest.kind == "seed":
            lines.append(f"seed  {short(manifest.digest)}  {origin(manifest)}")
            lines += _branches([_expert(one, now) for one in manifests if one.kind == "expert"])
    for manifest in manifests:
        if manifest.kind == "generalist":
            lines += [
                "",
                f"{manifest.name}  {short(manifest.digest)}  generalist, {manifest.config.get('method')}",
            ]
            members = [parent for parent in manifest.parents if parent.kind != "seed"]
            lines += _branches([_parent(parent, now) for parent in members])
    return lines


def _branches(items: Sequence[str]) -> list[str]:
    return [f"{'└──' if index == len(items) else '├──'} {item}" for index, item in enumerate(items, start=1)]


def _expert(manifest: Manifest, now: dict[str, str]) -> str:
    others = [parent for parent in manifest.parents if parent.kind == "expert"]
    starts = [f"{parent.name} {parent.weight or 0:.2f}{_since(parent, now)}" for parent in others]
    start = f", from {', '.join(starts)}" if starts else ""
    seed = next((parent for parent in manifest.parents if parent.kind == "seed"), None)
    foreign = f"  (of another seed, {short(seed.digest)})" if seed and seed.digest != now.get("seed") else ""
    return f"{manifest.name}  {short(manifest.digest)}  {origin(manifest)}{start}{foreign}"


def _parent(parent: Parent, now: dict[str, str]) -> str:
    weight = f"  {parent.weight:.3f}" if parent.weight is not None else ""
    return f"{parent.name}  {short(parent.digest)}{weight}{_since(parent, now)}"


def _since(parent: Parent, now: dict[str, str]) -> str:
    """Return what has become of a parent: nothing to say, made again, or gone."""
    if parent.name not in now:
        return " (no longer here)"
    return "" if now[parent.name] == parent.digest else " (made again since)"
