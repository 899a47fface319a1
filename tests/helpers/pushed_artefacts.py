"""Artefacts for tests of transfers: an expert of any size, made without a model."""

from __future__ import annotations

from pathlib import Path

import torch

from expertctl.core.artefacts.safetensors_io import write_tensors
from expertctl.core.manifests.finishing import finish_artefact
from expertctl.core.manifests.manifest import Manifest


def write_large_expert(folder: Path, num_bytes: int, *, shards: int = 1, seed: int = 0) -> Manifest:
    """Write an expert with about `num_bytes` of random tensors in several files."""
    folder.mkdir(parents=True)
    noise = torch.Generator().manual_seed(seed)
    for shard in range(shards):
        size = num_bytes // shards
        tensor = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=noise)
        write_tensors(folder / f"part-{shard}.safetensors", {f"tensor.{shard}": tensor})
    (folder / "notes").mkdir()
    (folder / "notes" / "empty.txt").write_text("")
    (folder / "notes" / "lines.txt").write_text("a line\n")
    return finish_artefact(folder, Manifest(kind="expert", name=folder.name))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every visible file by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
