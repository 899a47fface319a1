"""Descriptions of artefacts shared by several commands."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import Table, number, shares, short

if TYPE_CHECKING:
    from ..core.manifests.manifest import Manifest
    from ..core.models.decoding.memories.manifest import MemoryManifest
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


def memory_content(memory: MemoryManifest) -> dict[str, Any]:
    """Return the `--json` content for a memory."""
    return {
        "name": memory.name,
        "kind": "memory",
        "digest": memory.digest,
        "model": memory.model.name,
        "domains": list(memory.domains),
        "keys": memory.keys,
        "index": asdict(memory.index),
        "fit": None if memory.fit is None else asdict(memory.fit),
    }


def memory_origin(memory: MemoryManifest) -> str:
    """Return a short description of how a memory was made."""
    return f"{number(memory.keys)} keys of {memory.model.name} on {', '.join(memory.domains)}"


def show_memory(session: Session, folder: Path) -> None:
    """Print what the manifest of a memory says."""
    from ..core.manifests.records import record_as_json
    from ..core.models.decoding.memories.manifest import read_memory

    memory = read_memory(folder)
    index, fit = memory.index, memory.fit
    lists = f", {index.probes} of {number(index.lists)} lists" if index.lists is not None and index.probes else ""
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    facts = [
        ("name", memory.name),
        ("kind", "memory"),
        ("folder", str(folder)),
        ("digest", memory.digest),
        ("model", f"{memory.model.name} {short(memory.model.digest)}"),
        *((f"domain {name}", f"{number(count)} keys") for name, count in memory.domain_keys.items()),
        ("keys", f"{number(memory.keys)} of width {memory.width}: {memory.key.replace('_', ' ')}"),
        ("context", f"at least {memory.context} tokens in windows of {memory.window}"),
        ("index", f"{index.kind}, {index.codes}{lists}"),
        ("fitted", fit_line(memory) if fit is not None else "not yet: `expertctl memory fit`"),
        ("size", f"{number(size)} bytes"),
    ]
    session.finish({"folder": str(folder), **record_as_json(memory)}, Table(("", ""), facts, headings=False))


def fit_line(memory: MemoryManifest) -> str:
    """Return what was fitted, in one line."""
    fit = memory.fit
    assert fit is not None, "it was fitted"
    return (
        f"lambda {fit.lambda_:.3f}, temperature {fit.temperature:.3g}, k {fit.k}: {fit.bits_with:.4f} bits per token instead of "
        f"{fit.bits_without:.4f} on validation text of {', '.join(fit.domains)}"
    )
