"""Opens the models of a merge by their headers: location and expected digest of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.digests import tensor_prefix
from ...core.artefacts.files import read_json
from ...core.artefacts.safetensors_io import Checkpoint, TensorEntry, checkpoint_files
from ...core.errors import UserError
from ...core.manifests.manifest import Manifest, manifest_path, read_manifest
from ...core.models.loading import ExpertTensors, seed_of
from .adapters import ADAPTER_CONFIG
from .tensor_names import HEADS, embedding_name

if TYPE_CHECKING:
    from .adapters import Adapter

DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")
"""Name suffixes of buffers in old checkpoints that models recompute."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one model: its location, and the adapter to apply to it."""

    entry: TensorEntry
    expected: str | None = None
    """Digest according to the manifest of its folder; None without a manifest."""
    adapter: Adapter | None = None
    """Adapter to apply to the tensor; None: no adapter."""
    name: str = ""
    """Name of the tensor in the model."""

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
    """Folder with `config.json` and tokenizer; for an expert, its seed's folder."""
    tensors: Mapping[str, StoredTensor]
    kind: str
    """`seed`, `expert`, `generalist`, `adapter`, or `model` for any other Hugging Face folder."""
    manifest: Manifest | None = None
    adapter: Adapter | None = None
    changed: frozenset[str] = field(default_factory=frozenset)
    """Names of tensors that differ from the seed's."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of `config.json`."""
        return read_json(self.model_folder / "config.json")

    @cached_property
    def num_layers(self) -> int:
        """Number of decoder layers; raises `UserError` if the configuration does not contain it."""
        dense = self.config.get("member", self.config)  # containers nest the configuration of their members
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            value = dense.get(key)
            if isinstance(value, int):
                return value
        raise UserError(f"{self.model_folder / 'config.json'} does not contain the number of layers")


def open_source(name: str, folder: Path, seed: Source | None = None, *, allow_containers: bool = False) -> Source:
    """Open one model by its headers: an artefact, a Hugging Face folder, or an adapter of `seed`.

    Raises `UserError` for folders that are unfinished, damaged, pickled or of an unknown kind, and for generalists that
    contain several models, unless `allow_containers` is set.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; merges need local model folders")
    if (folder / ADAPTER_CONFIG).is_file():
        return _open_adapter(name, folder, seed)
    path = manifest_path(folder)
    if path is None:
        if (folder / "run.json").is_file():
            raise UserError(f"{folder} is not finished: it has a run.json, but no manifest; finish its training first")
        return _open_model(name, folder, "model", None)
    manifest = read_manifest(folder)
    if manifest.kind == "expert":
        return _open_expert(name, folder, manifest, seed)
    model_type = str(read_json(folder / "config.json").get("model_type", ""))
    if model_type.startswith("expertctl_") and not allow_containers:
        raise UserError(f"{folder} is a generalist that contains several models; merge its experts instead")
    return _open_model(name, folder, manifest.kind, manifest)


def _open_model(name: str, folder: Path, kind: str, manifest: Manifest | None) -> Source:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is not a model folder, or it is unfinished")
    checkpoint = Checkpoint.of_folder(folder)
    expected = _expected_digests(folder, manifest)
    tensors = {
        tensor: StoredTensor(entry, expected.get(tensor), name=tensor) for tensor, entry in checkpoint.entries.items()
    }
    tensors = _drop_tied_heads(tensors, read_json(folder / "config.json"))
    return Source(name, folder, folder, tensors, kind, manifest, changed=frozenset(tensors))


def _open_expert(name: str, folder: Path, manifest: Manifest, seed: Source | None) -> Source:
    """Open an expert: the tensors that training changed, and the seed's tensors otherwise."""
    seed_source = seed
    if seed_source is None or seed_source.manifest is None or not _descends_from(manifest, seed_source.manifest):
        seed_source = _open_model("seed", seed_folder := seed_of(folder, manifest), "seed", read_manifest(seed_folder))
    trained_entries = ExpertTensors(Checkpoint.of_folder(seed_source.folder), folder).changed.entries
    changed = {
        tensor: StoredTensor(entry, manifest.tensors.get(tensor), name=tensor)
        for tensor, entry in trained_entries.items()
    }
    tensors = {**seed_source.tensors, **changed}
    return Source(
        name,
        folder,
        seed_source.model_folder,
        tensors,
        "expert",
        manifest,
        changed=frozenset(changed),
    )


def _descends_from(expert: Manifest, seed: Manifest) -> bool:
    return any(parent.kind == "seed" and parent.digest == seed.digest for parent in expert.parents)


def _open_adapter(name: str, folder: Path, base: Source | None) -> Source:
    from .adapters import Adapter

    if base is None:
        raise UserError(
            f"{folder} is an adapter and needs the model it was trained on; give that model as the seed (base_model)"
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
    """Return the digests of a checkpoint's tensors according to its manifest."""
    if manifest is None:
        return {}
    files = checkpoint_files(folder)
    prefixes = {tensor_prefix(folder, file) for file in files}
    assert prefixes == {""}, prefixes  # checkpoint files are at the top of their folder
    return dict(manifest.tensors)


def _drop_tied_heads(tensors: dict[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Drop a stored output head if it is tied to the embedding, as loading does."""
    embedding = embedding_name(tensors)
    if not config.get("tie_word_embeddings", False) or embedding is None:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name not in HEADS}
