"""The models that take part in a merge, opened by their headers: which tensor lies where, and what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.files import read_json
from ...core.artefacts.lineage import Manifest, manifest_path, read_manifest, tensor_prefix
from ...core.artefacts.safetensors_io import Checkpoint, TensorEntry, checkpoint_files
from ...core.errors import UserError
from ...core.models.loading import ExpertTensors, seed_of
from .adapters import ADAPTER_CONFIG
from .tensor_names import HEADS, embedding_name

if TYPE_CHECKING:
    from .adapters import Adapter

DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")
"""Endings of buffers that old checkpoints hold and models calculate anew."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one model: where its numbers lie, and what has to happen to them before they are merged."""

    entry: TensorEntry
    expected: str | None = None
    """Its digest by the manifest of the folder it lies in, if there is one."""
    adapter: Adapter | None = None
    """Changes the numbers: the tensor of the model that the adapter was trained on becomes the adapted one."""
    name: str = ""
    """What the model calls it: an adapter asks."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> str:
        return self.entry.dtype


@dataclass(frozen=True)
class Source:
    """One model of a merge."""

    name: str
    folder: Path
    model_folder: Path
    """Where its `config.json` and tokenizer are: an expert's are its seed's."""
    tensors: Mapping[str, StoredTensor]
    kind: str
    """`seed`, `expert`, `generalist`, `adapter`, or `model` for any other Hugging Face folder."""
    manifest: Manifest | None = None
    adapter: Adapter | None = None
    own: frozenset[str] = field(default_factory=frozenset)
    """Tensors that are not simply those of the seed."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its `config.json`."""
        return read_json(self.model_folder / "config.json")

    @cached_property
    def num_layers(self) -> int:
        """How many decoder layers it has, by its configuration; raises `UserError` where that does not say."""
        dense = self.config.get("member", self.config)  # a container's says it within
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            found = dense.get(key)
            if isinstance(found, int):
                return found
        raise UserError(f"{self.model_folder / 'config.json'} does not say how many layers the model has")


def open_source(
    name: str, folder: Path, seed: Source | None = None, *, allow_containers: bool = False
) -> Source:
    """Open one model by its headers: an artefact of ours, a Hugging Face folder, or an adapter of `seed`.

    Generalists of classes of ours hold several models and are refused, unless `allow_containers`.

    Raises `UserError` for folders that are unfinished, damaged, pickled or of no known kind.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; models of a merge are folders on this machine")
    if (folder / ADAPTER_CONFIG).is_file():
        return _open_adapter(name, folder, seed)
    path = manifest_path(folder)
    if path is None:
        if (folder / "run.json").is_file():
            raise UserError(
                f"{folder} is not finished: it has a run.json and no manifest; train it to its end"
            )
        return _open_model(name, folder, "model", None)
    manifest = read_manifest(folder)
    if manifest.kind == "expert":
        return _open_expert(name, folder, manifest, seed)
    kind = str(read_json(folder / "config.json").get("model_type", ""))
    if kind.startswith("expertctl_") and not allow_containers:
        raise UserError(f"{folder} is a generalist of several models side by side; merge its experts instead")
    return _open_model(name, folder, manifest.kind, manifest)


def _open_model(name: str, folder: Path, kind: str, manifest: Manifest | None) -> Source:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is no model folder, or an unfinished one")
    checkpoint = Checkpoint.of_folder(folder)
    expected = _expected_digests(folder, manifest)
    tensors = {
        tensor: StoredTensor(entry, expected.get(tensor), name=tensor)
        for tensor, entry in checkpoint.entries.items()
    }
    tensors = _without_copies_of_tied(tensors, read_json(folder / "config.json"))
    return Source(name, folder, folder, tensors, kind, manifest, own=frozenset(tensors))


def _open_expert(name: str, folder: Path, manifest: Manifest, seed: Source | None) -> Source:
    """Open an expert: its own tensors where training changed them, its seed's elsewhere."""
    origin = seed
    if origin is None or origin.manifest is None or not _descends(manifest, origin.manifest):
        origin = _open_model(
            "seed", seed_folder := seed_of(folder, manifest), "seed", read_manifest(seed_folder)
        )
    own = ExpertTensors(Checkpoint.of_folder(origin.folder), folder).changed.entries
    changed = {
        tensor: StoredTensor(entry, manifest.tensors.get(tensor), name=tensor)
        for tensor, entry in own.items()
    }
    tensors = {**origin.tensors, **changed}
    return Source(name, folder, origin.model_folder, tensors, "expert", manifest, own=frozenset(changed))


def _descends(expert: Manifest, seed: Manifest) -> bool:
    return any(parent.kind == "seed" and parent.digest == seed.digest for parent in expert.parents)


def _open_adapter(name: str, folder: Path, base: Source | None) -> Source:
    from .adapters import Adapter

    if base is None:
        raise UserError(
            f"{folder} is an adapter, which is nothing without the model it was trained on; give that as the seed "
            "(base_model)"
        )
    adapter = Adapter.open(folder, Checkpoint.of_folder(base.model_folder))
    changed = {
        tensor: StoredTensor(base.tensors[tensor].entry, base.tensors[tensor].expected, adapter, tensor)
        for tensor in adapter.changed
    }
    return Source(
        name,
        folder,
        base.model_folder,
        {**base.tensors, **changed},
        "adapter",
        None,
        adapter,
        frozenset(changed),
    )


def _expected_digests(folder: Path, manifest: Manifest | None) -> dict[str, str]:
    """Return what each tensor of an artefact's checkpoint should be, by its name there."""
    if manifest is None:
        return {}
    files = checkpoint_files(folder)
    prefixes = {tensor_prefix(folder, file) for file in files}
    assert prefixes == {""}, prefixes  # a checkpoint's files lie at the top of its folder
    return dict(manifest.tensors)


def _without_copies_of_tied(
    tensors: dict[str, StoredTensor], config: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Leave out a stored output head where the model uses the embedding for it: loading ignores it too."""
    embedding = embedding_name(tensors)
    if not config.get("tie_word_embeddings", False) or embedding is None:
        return tensors
    return {name: one for name, one in tensors.items() if name not in HEADS}
