"""Proof that an expert is not in a model: no tensor of it is there, byte for byte; and who saw it, as far as is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.artefacts.lineage import Manifest, digests_of_folder, manifest_path, read_manifest
from ...core.artefacts.numeric import FLOATING, encode
from ...core.artefacts.safetensors_io import Checkpoint, TensorEntry, digest_start
from ...core.errors import UserError
from ..engine.reading import Reader
from ..sources.history import history_of
from ..sources.models import StoredTensor
from .opened import slice_of

_SMALLEST = 2
"""Tensors of fewer numbers say nothing: many are equal by chance."""


@dataclass(frozen=True)
class Absence:
    """What a search for an expert's tensors in a folder found."""

    expert: str
    compared: int
    """Tensors of the expert that were looked for."""
    found: tuple[str, ...]
    """Those that are in the folder, by their names there."""
    merged: str | None
    """How the expert is part of the model all the same: as a share of a mean, or as an expert that trained in it."""
    traces: tuple[str, ...]
    """Sentences on what was trained while the expert was there."""
    made_in_it: bool = False
    """Whether the expert came to be within the model, so that its manifest alone knows of it."""


def find_expert(folder: Path, expert: Path) -> Absence:
    """Look for every tensor of an expert in a model's files, by digests; tensors that hold several are cut apart.

    Raises `UserError` for folders without a manifest.
    """
    for place in (folder, expert):
        if manifest_path(place) is None:
            raise UserError(f"{place} has no manifest, so that it is not known what is in it")
    theirs, manifest = read_manifest(expert), read_manifest(folder)
    if theirs.kind != "expert":
        raise UserError(f"{expert} is no expert, but a {theirs.kind}")
    entries = _worth_looking_for(expert, theirs)
    wanted = {theirs.tensors[name] for name in entries} | _rounded(entries, _dtypes(folder))
    found = [name for name, digest in _all_digests(folder, len(_slots(manifest))).items() if digest in wanted]
    return Absence(
        theirs.name,
        len(entries),
        tuple(sorted(found)),
        _merged(manifest, theirs),
        tuple(_traces(manifest, theirs.name)),
    )


def find_own_expert(folder: Path, name: str) -> Absence | None:
    """Return what the manifest says of an expert that came to be within the model: no artefact holds its tensors.

    None for every other expert.
    """
    if manifest_path(folder) is None:
        return None
    manifest = read_manifest(folder)
    record = manifest.config.get("mixture") or {}
    if all(name not in tuning.get("made", ()) for tuning in record.get("tuned", ())):
        return None
    merged = f"'{name}' is one of its experts" if name in _slots(manifest) else None
    return Absence(name, 0, (), merged, tuple(_traces(manifest, name)), made_in_it=True)


def _worth_looking_for(expert: Path, manifest: Manifest) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in sorted(expert.glob("*.safetensors")):
        entries |= Checkpoint([file]).entries
    # what an expert knows of public text is no part of it
    return {
        name: entry
        for name, entry in entries.items()
        if name in manifest.tensors and name != "public" and entry.num_bytes > _SMALLEST * 8
    }


def _dtypes(folder: Path) -> set[str]:
    files = folder.rglob("*.safetensors")
    return {entry.dtype for file in files for entry in Checkpoint([file]).entries.values()} & set(FLOATING)


def _rounded(entries: Mapping[str, TensorEntry], dtypes: set[str]) -> set[str]:
    """Return the digests that tensors have in a model of another dtype."""
    found = set()
    with Reader() as reader:
        for name, entry in entries.items():
            for dtype in dtypes - {entry.dtype}:
                state = digest_start(dtype, entry.shape)
                content: Any = encode(reader.whole(StoredTensor(entry, name=name)), dtype)
                state.update(content)
                found.add(state.hexdigest())
    return found


def _all_digests(folder: Path, experts: int) -> dict[str, str]:
    """Return the digests of a folder's tensors as they are, and of the pieces of those that hold several experts'."""
    found, _ = digests_of_folder(folder)
    with Reader() as reader:
        for file in sorted(folder.rglob("*.safetensors")):
            for name, entry in Checkpoint([file]).entries.items():
                if len(entry.shape) == 3 and entry.shape[0] == experts:
                    for count in (experts, 2 * experts):
                        if entry.shape[1] * experts % count == 0:
                            found |= _pieces(reader, name, entry, count)
    return found


def _pieces(reader: Reader, name: str, entry: TensorEntry, count: int) -> dict[str, str]:
    digests = {}
    for number in range(count):
        piece = slice_of(StoredTensor(entry, name=name), number, count)
        for _ in reader.raw(piece):
            pass
        digests[f"{name}[{number} of {count}]"] = reader.digests[piece.entry]
    return digests


def _slots(manifest: Manifest) -> list[str]:
    return list((manifest.config.get("mixture") or {}).get("experts", ()))


def _merged(manifest: Manifest, expert: Manifest) -> str | None:
    """Return how the manifest says that the expert is part of the model; None where it does not."""
    if all(parent.digest != expert.digest for parent in manifest.parents):
        averaged = (manifest.config.get("mixture") or {}).get("averaged", ())
        if any(one["digest"] == expert.digest for one in averaged):
            return f"'{expert.name}' is part of the mean that all but its feed-forwards is"
        return None
    if expert.name in _slots(manifest):
        return f"'{expert.name}' is one of its experts"
    return f"'{expert.name}' was merged into it"


def _traces(manifest: Manifest, expert: str) -> list[str]:
    """Return what was trained, or fitted, jointly while the expert was one of the model's."""
    record: Mapping[str, Any] = manifest.config.get("mixture") or {}
    found = [
        f"'{name}' began as a copy of '{origin}'"
        for name, origins in _origins(record).items()
        if name in _slots(manifest)
        for origin in origins
        if origin == expert
    ]
    found += [
        f"its {tuning['trains']} was trained on {', '.join(tuning['domains'])} while '{expert}' was one of the "
        "experts: those tensors have seen it"
        for tuning in record.get("tuned", ())
        if expert in tuning.get("experts", ()) and "began_as" not in tuning  # where a newcomer alone trained
    ]
    for change in history_of(manifest):
        if change["expert"] == expert:
            found.append(f"'{expert}' {change['what']} on {change['when']}")
            if change["what"] != "joined" and (record.get("router") or {}).get("uses_text"):
                found.append(
                    "the router's rows were fitted on text of all experts together, that one included"
                )
    return found


def _origins(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return, for each expert that began as a copy of another, that one, what that one began as, and so on."""
    parents: dict[str, str] = {}
    for tuning in record.get("tuned", ()):
        parents |= tuning.get("began_as", {})
    chains = {}
    for name in parents:
        chain = [name]
        while chain[-1] in parents and parents[chain[-1]] not in chain:
            chain.append(parents[chain[-1]])
        chains[name] = chain[1:]
    return chains
