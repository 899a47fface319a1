"""Checking every byte of an artefact against its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ..artefacts.digests import artefact_files, digest_of_file, digest_of_tensors, tensor_prefix
from ..artefacts.files import read_json
from ..artefacts.safetensors_io import Checkpoint
from ..errors import UserError
from .manifest import CHECKSUM, Manifest, manifest_path, read_manifest


def verify(folder: str | Path, *, tensors: bool = True, manifest: Manifest | None = None) -> list[str]:
    """Check every byte of an artefact and return the differences, one line each.

    Without `tensors` only headers and all other files are checked. `manifest` is the folder's, if it has been read.
    """
    folder = Path(folder)
    manifest = manifest or read_manifest(folder)
    differences: list[str] = []
    files = {path.relative_to(folder).as_posix(): path for path in artefact_files(folder)}
    for name in sorted(manifest.files.keys() | files.keys()):
        if name not in files:
            differences.append(f"file {name} is missing")
        elif name not in manifest.files:
            differences.append(f"file {name} was added")
        elif digest_of_file(files[name]) != manifest.files[name]:
            differences.append(f"file {name} was changed")
    if tensors:
        differences += _verify_tensors(folder, manifest, files)
    if digest_of_tensors(manifest.tensors) != manifest.digest:
        differences.append("the manifest's own list of tensors does not match its digest")
    path = manifest_path(folder)
    if path is not None and not _is_as_written(path):
        differences.append(f"{path.name} itself was changed")
    return differences


def _is_as_written(manifest: Path) -> bool:
    """Return whether a manifest's text has the checksum that it holds."""
    checksum = read_json(manifest).get(CHECKSUM)
    text = manifest.read_bytes().decode("utf-8").replace(f'"{CHECKSUM}": "{checksum}"', f'"{CHECKSUM}": ""')
    return hashlib.sha256(text.encode("utf-8")).hexdigest() == checksum


def _verify_tensors(folder: Path, manifest: Manifest, files: Mapping[str, Path]) -> list[str]:
    differences: list[str] = []
    seen: set[str] = set()
    for path in files.values():
        if path.suffix != ".safetensors":
            continue
        prefix = tensor_prefix(folder, path)
        try:
            digests = Checkpoint([path]).digests()
        except UserError as error:
            differences.append(str(error))
            continue
        seen |= {prefix + name for name in digests}
        differences += [
            f"tensor {prefix}{name} was changed"
            for name, digest in digests.items()
            if manifest.tensors.get(prefix + name) != digest
        ]
    return differences + [f"tensor {name} is missing" for name in sorted(manifest.tensors.keys() - seen)]


def require_intact(folder: Path, *, tensors: bool = True, manifest: Manifest | None = None) -> Manifest:
    """Return the manifest of an artefact that was checked (see `verify`); raises `UserError` with the first difference."""
    manifest = manifest or read_manifest(folder)
    problems = verify(folder, tensors=tensors, manifest=manifest)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{folder} is not what its manifest says: {problems[0]}{more}; restore or remake it")
    return manifest
