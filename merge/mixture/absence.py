"""Verify that a model contains no tensor of an expert, and list what was trained jointly with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.artefacts.digests import digests_of_folder
from ...core.artefacts.numeric import FLOATING, encode
from ...core.artefacts.safetensors_io import Checkpoint, TensorEntry, digest_start
from ...core.errors import UserError
from ...core.manifests.generalist import Tuning
from ...core.manifests.manifest import Manifest, manifest_path, read_manifest
from ..engine.reading import Reader
from ..sources.models import StoredTensor
from .opened import slice_of

_SMALLEST = 2
"""Tensors with up to this many elements are not compared: they can be equal by chance."""


@dataclass(frozen=True)
class Absence:
    """Result of the search for an expert's tensors in a model folder."""

    expert: str
    compared: int
    """Number of the expert's tensors that were searched for."""
    found: tuple[str, ...]
    """Names, in the folder, of the tensors that match."""
    merged: str | None
    """How the manifest says that the expert is part of the model, in words; None if it is not."""
    traces: tuple[str, ...]
    """Sentences about what was trained or fitted while the expert was in the model."""
    trained_inside: bool = False
    """Whether the expert was trained inside the model, so that only the manifest records it."""


def find_expert(folder: Path, expert: Path) -> Absence:
    """Search a model's files for every tensor of an expert by digest, splitting fused expert tensors.

    Raises `UserError` for a folder without a manifest and for an artefact that is not an expert.
    """
    for path in (folder, expert):
        if manifest_path(path) is None:
            raise UserError(f"{path} has no manifest, so its tensors have no recorded digests")
    expert_manifest, manifest = read_manifest(expert), read_manifest(folder)
    if expert_manifest.kind != "expert":
        raise UserError(f"{expert} is not an expert but a {expert_manifest.kind}")
    entries = _comparable_entries(expert, expert_manifest)
    digests = {expert_manifest.tensors[name] for name in entries} | _rounded_digests(entries, _dtypes(folder))
    matches = [name for name, digest in _all_digests(folder, len(_slots(manifest))).items() if digest in digests]
    return Absence(
        expert_manifest.name,
        len(entries),
        tuple(sorted(matches)),
        _merged(manifest, expert_manifest),
        tuple(_traces(manifest, expert_manifest.name)),
    )


def find_own_expert(folder: Path, name: str) -> Absence | None:
    """Return the manifest's record of an expert that was trained inside the model.

    Returns None for every other expert.
    """
    if manifest_path(folder) is None:
        return None
    manifest = read_manifest(folder)
    if all(name not in tuning.trained_inside for tuning in manifest.tunings):
        return None
    merged = f"'{name}' is one of its experts" if name in _slots(manifest) else None
    return Absence(name, 0, (), merged, tuple(_traces(manifest, name)), trained_inside=True)


def _comparable_entries(expert: Path, manifest: Manifest) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in sorted(expert.glob("*.safetensors")):
        entries |= Checkpoint([file]).entries
    # "public" is the mean hidden state of public text, which other experts may share
    return {
        name: entry
        for name, entry in entries.items()
        if name in manifest.tensors and name != "public" and entry.num_bytes > _SMALLEST * 8
    }


def _dtypes(folder: Path) -> set[str]:
    files = folder.rglob("*.safetensors")
    return {entry.dtype for file in files for entry in Checkpoint([file]).entries.values()} & set(FLOATING)


def _rounded_digests(entries: Mapping[str, TensorEntry], dtypes: set[str]) -> set[str]:
    """Return the digests of tensors after conversion to other dtypes."""
    digests = set()
    with Reader() as reader:
        for name, entry in entries.items():
            for dtype in dtypes - {entry.dtype}:
                state = digest_start(dtype, entry.shape)
                content: Any = encode(reader.read(StoredTensor(entry, name=name)), dtype)
                state.update(content)
                digests.add(state.hexdigest())
    return digests


def _all_digests(folder: Path, experts: int) -> dict[str, str]:
    """Return the digests of a folder's tensors and of the per-expert slices of fused tensors, by name."""
    digests, _ = digests_of_folder(folder)
    with Reader() as reader:
        for file in sorted(folder.rglob("*.safetensors")):
            for name, entry in Checkpoint([file]).entries.items():
                if len(entry.shape) == 3 and entry.shape[0] == experts:
                    for count in (experts, 2 * experts):
                        if entry.shape[1] * experts % count == 0:
                            digests |= _slice_digests(reader, name, entry, count)
    return digests


def _slice_digests(reader: Reader, name: str, entry: TensorEntry, count: int) -> dict[str, str]:
    digests = {}
    for number in range(count):
        piece = slice_of(StoredTensor(entry, name=name), number, count)
        for _ in reader.raw(piece):
            pass
        digests[f"{name}[{number} of {count}]"] = reader.digests[piece.entry]
    return digests


def _slots(manifest: Manifest) -> list[str]:
    return list(manifest.merged.experts) if manifest.merged is not None else []


def _merged(manifest: Manifest, expert: Manifest) -> str | None:
    """Return how the manifest says that the expert is part of the model, or None if it is not."""
    if all(parent.digest != expert.digest for parent in manifest.parents):
        mixture = manifest.merged.mixture if manifest.merged is not None else None
        averaged = mixture.averaged if mixture is not None else ()
        if any(member.digest == expert.digest for member in averaged):
            return f"'{expert.name}' is part of the mean of all tensors outside the feed-forward networks"
        return None
    if expert.name in _slots(manifest):
        return f"'{expert.name}' is one of its experts"
    return f"'{expert.name}' was merged into it"


def _traces(manifest: Manifest, expert: str) -> list[str]:
    """Return sentences about what was trained or fitted while the expert was in the model."""
    mixture = manifest.merged.mixture if manifest.merged is not None else None
    traces = [
        f"'{name}' started as a copy of '{origin}'"
        for name, origins in _origins(manifest.tunings).items()
        if name in _slots(manifest)
        for origin in origins
        if origin == expert
    ]
    traces += [
        f"trainer '{tuning.trains}' ran on {', '.join(tuning.domains)} while '{expert}' was one of the "
        "experts, so the trained tensors depend on it"
        for tuning in manifest.tunings
        if expert in tuning.experts and not tuning.copied_from  # there, only the new expert was trained
    ]
    for change in manifest.history:
        if change.expert == expert:
            traces.append(f"'{expert}' {change.change} on {change.date}")
            if change.change != "joined" and mixture is not None and mixture.router.uses_text:
                traces.append("the router's rows were fitted on text of all experts, including this one")
    return traces


def _origins(tunings: Sequence[Tuning]) -> dict[str, list[str]]:
    """Return the chain of ancestors of each expert that started as a copy of another, nearest first."""
    parents: dict[str, str] = {}
    for tuning in tunings:
        parents |= tuning.copied_from
    chains = {}
    for name in parents:
        chain = [name]
        while chain[-1] in parents and parents[chain[-1]] not in chain:
            chain.append(parents[chain[-1]])
        chains[name] = chain[1:]
    return chains
