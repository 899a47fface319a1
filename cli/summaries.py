"""Descriptions of artefacts shared by several commands."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import shares, short

if TYPE_CHECKING:
    from ..core.manifests.manifest import Manifest
    from .context import Session


def artefact_content(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the `--json` content for a new artefact."""
    search = manifest.merged.search if manifest.merged is not None else None
    return {
        "name": manifest.name,
        "kind": manifest.kind,
        "folder": str(folder.resolve()),
        "digest": manifest.digest,
        "method": manifest.method,
        "weights": dict(manifest.merged.weights) if manifest.merged is not None else None,
        **({"search": asdict(search)} if search is not None else {}),
        "metrics": dict(manifest.metrics),
        "licence": manifest.licence,
    }


def artefact_line(folder: Path, manifest: Manifest) -> str:
    """Return one line that describes a new artefact."""
    title = f"{manifest.kind} '{manifest.name}'" if manifest.kind != "seed" else "seed"
    return f"{title} {short(manifest.digest)} is in {folder}"


def show_artefact(session: Session, folder: Path, manifest: Manifest, *parts: str) -> None:
    """Print the result of a command that made an artefact."""
    session.finish(artefact_content(folder, manifest), artefact_line(folder, manifest), *parts)


def origin(manifest: Manifest) -> str:
    """Return a short description of how an artefact was made."""
    merged = manifest.merged
    if merged is not None:
        if merged.kind == "shared":
            return f"{len(merged.rounds)} rounds of {merged.method} by {', '.join(manifest.expert_data)}"
        if merged.weights:
            return f"{merged.method} of {shares(merged.weights)}"
        experts = [parent.name for parent in manifest.parents if parent.kind == "expert"]
        return f"{merged.method} of {', '.join(experts)}" if experts else merged.method
    domains = ", ".join(manifest.domains)
    if manifest.kind == "expert":
        return f"trained {manifest.trainable} on {domains}"
    if domains:
        return f"pretrained on {domains}"
    return ", ".join(["imported", *_imported_facts(manifest.config)])


def _imported_facts(config: object) -> list[str]:
    from ..core.manifests.manifest import ImportedSeed

    if not isinstance(config, ImportedSeed):
        return ["None"]
    facts = [str(config.model_type)]
    if config.rope_base is not None:
        facts.append(f"RoPE base {config.rope_base:g}")
    if config.positions is not None:
        facts.append(f"{config.positions:,} positions")
    return facts
