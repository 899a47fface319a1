"""Verify that a model contains no tensor of an expert, and list what was trained jointly with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.artefacts.digests import digests_of_folder
from ...core.artefacts.numeric import FLOATING, encode
from ...core.artefacts.safetensors_io import Checkpoint, TensorEntry, digest_start
from ...core.errors import UserError
from ...core.manifests.generalist import MixtureRecord
from ...core.manifests.manifest import Manifest, find_manifest, read_manifest
from ..engine.reading import Reader
from ..sources.models import StoredTensor
from .opened import shared_tensors_are_the_seeds, slice_of
from .routing.stored_statistics import has_statistics

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
    manifest, expert_manifest = read_manifest(folder), read_manifest(expert)
    if expert_manifest.kind != "expert":
        raise UserError(f"{expert} is not an expert but a {expert_manifest.kind}")
    # "public" is the mean hidden state of public text, which other experts may share
    searched = [
        entry
        for name, entry in dict(_entries(sorted(expert.glob("*.safetensors")))).items()
        if name in expert_manifest.tensors and name != "public" and entry.num_bytes > _SMALLEST * 8
    ]
    stored = _entries(sorted(folder.rglob("*.safetensors")))
    dtypes = {entry.dtype for _, entry in stored} & set(FLOATING)
    stored_digests, _ = digests_of_folder(folder)
    with Reader() as reader:
        digests = {expert_manifest.tensors[entry.name] for entry in searched}
        digests |= {_rounded_digest(reader, entry, dtype) for entry in searched for dtype in dtypes - {entry.dtype}}
        for name, entry in stored:
            stored_digests |= _slice_digests(reader, name, entry, len(_slots(manifest)))
    return Absence(
        expert_manifest.name,
        len(searched),
        tuple(sorted(name for name, digest in stored_digests.items() if digest in digests)),
        _merged(manifest, expert_manifest),
        tuple(_traces(manifest, expert_manifest.name)),
    )


def find_own_expert(folder: Path, name: str) -> Absence | None:
    """Return the manifest's record of an expert that was trained inside the model; None for every other expert."""
    manifest = find_manifest(folder)
    if manifest is None or all(name not in tuning.trained_inside for tuning in manifest.tunings):
        return None
    merged = f"'{name}' is one of its experts" if name in _slots(manifest) else None
    return Absence(name, 0, (), merged, tuple(_traces(manifest, name)), trained_inside=True)


def _entries(files: Iterable[Path]) -> list[tuple[str, TensorEntry]]:
    return [item for file in files for item in Checkpoint([file]).entries.items()]


def _rounded_digest(reader: Reader, entry: TensorEntry, dtype: str) -> str:
    state = digest_start(dtype, entry.shape)
    content: Any = encode(reader.read(StoredTensor(entry)), dtype)
    state.update(content)
    return state.hexdigest()


def _slice_digests(reader: Reader, name: str, entry: TensorEntry, num_experts: int) -> dict[str, str]:
    """Return the digests of the per-expert slices of a fused tensor, by name; none for any other tensor."""
    digests: dict[str, str] = {}
    if len(entry.shape) != 3 or entry.shape[0] != num_experts:
        return digests
    for count in (num_experts, 2 * num_experts):
        if entry.shape[1] * num_experts % count:
            continue  # the rows of one expert cannot be halved
        for number in range(count):
            piece = slice_of(StoredTensor(entry), number, count)
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
    origins = {name: origin for tuning in manifest.tunings for name, origin in tuning.copied_from.items()}
    traces = [
        f"'{name}' started as a copy of '{expert}'"
        for name in origins
        if name in _slots(manifest) and expert in _ancestors(name, origins)
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
                traces += _traces_in_router(manifest, mixture)
    return traces


def _traces_in_router(manifest: Manifest, mixture: MixtureRecord) -> list[str]:
    """Return how a router that is fitted on text depends on an expert that left."""
    if not has_statistics(manifest):
        return ["the router's rows were fitted on text of all experts, including this one"]
    if shared_tensors_are_the_seeds(mixture):
        return []  # the rows were computed again without it
    return ["the router's statistics of other experts were measured while it was part of the mean of the other tensors"]


def _ancestors(name: str, origins: Mapping[str, str]) -> list[str]:
    """Return the experts that an expert is directly or indirectly a copy of, nearest first."""
    chain = [name]
    while chain[-1] in origins and origins[chain[-1]] not in chain:
        chain.append(origins[chain[-1]])
    return chain[1:]
