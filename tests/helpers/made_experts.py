"""Finished experts that are made without training."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_expert(workspace: Path, name: str, *, changed: str = "*", seed: int = 1, scale: float = 0.5) -> Path:
    """Write a finished expert of a workspace's seed: the seed plus noise in the tensors that `changed` matches."""
    import torch

    from expertctl.core.artefacts.safetensors_io import Checkpoint

    base = Checkpoint.of_folder(workspace / "seed")
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for tensor_name in sorted(base):
        tensor = base.read(tensor_name)
        if fnmatchcase(tensor_name, changed) and tensor.is_floating_point():
            step = torch.randn(tensor.shape, generator=noise) * scale * tensor.float().std(correction=0).clamp(min=0.1)
            tensors[tensor_name] = (tensor.float() + step).to(tensor.dtype)
    return write_tensors_as_expert(workspace, name, tensors, changed=changed)


def write_tensors_as_expert(workspace: Path, name: str, tensors: Mapping[str, Tensor], *, changed: str = "*") -> Path:
    """Write a finished expert of a workspace's seed with these tensors."""
    from expertctl.core.artefacts.digests import digest_of_tensors, digests_of_folder
    from expertctl.core.artefacts.safetensors_io import write_tensors
    from expertctl.core.artefacts.versions import tool_versions
    from expertctl.core.manifests.manifest import Manifest, Parent, read_manifest
    from expertctl.core.manifests.statements import DataStatement, DomainStatement

    origin = read_manifest(workspace / "seed")
    folder = workspace / "experts" / name
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", tensors)
    digests, files = digests_of_folder(folder)
    Manifest(
        kind="expert",
        name=name,
        digest=digest_of_tensors(digests),
        tensors=digests,
        files=files,
        tokenizer=origin.tokenizer,
        parents=(Parent("seed", "seed", origin.digest, 1.0),),
        data=DataStatement({name: DomainStatement(1, 10, 30, "0" * 64)}),
        trainable=changed,
        licence="CC0-1.0",
        versions=tool_versions(),
    ).write(folder)
    return folder
