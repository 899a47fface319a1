"""What several commands say about an artefact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import shares, short

if TYPE_CHECKING:
    from ..core.artefacts.lineage import Manifest


def artefact_content(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return what `--json` says of an artefact that was just made."""
    return {
        "name": manifest.name,
        "kind": manifest.kind,
        "folder": str(folder.resolve()),
        "digest": manifest.digest,
        "method": manifest.config.get("method"),
        "weights": manifest.config.get("weights"),
        "metrics": dict(manifest.metrics),
        "licence": manifest.licence,
    }


def made(folder: Path, manifest: Manifest) -> str:
    """Return the line about an artefact that was just made."""
    what = f"{manifest.kind} '{manifest.name}'" if manifest.kind != "seed" else "seed"
    return f"{what} {short(manifest.digest)} is in {folder}"


def origin(manifest: Manifest) -> str:
    """Return in a few words how an artefact came about."""
    if manifest.kind == "generalist":
        method, weights = manifest.config.get("method"), manifest.config.get("weights")
        if manifest.config.get("kind") == "shared":
            return (
                f"{len(manifest.config.get('rounds', ()))} rounds of {method} by {', '.join(manifest.data)}"
            )
        if weights:
            return f"{method} of {shares(weights)}"
        experts = [parent.name for parent in manifest.parents if parent.kind == "expert"]
        return f"{method} of {', '.join(experts)}" if experts else str(method)
    if manifest.kind == "expert":
        domains = ", ".join(manifest.data.get("domains", {}))
        return f"trained {manifest.trainable} on {domains}"
    if manifest.data.get("domains"):
        return f"pretrained on {', '.join(manifest.data['domains'])}"
    return f"imported, {manifest.config.get('model_type')}"
