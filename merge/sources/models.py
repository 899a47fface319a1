"""Opens the models of a merge by their headers: location and expected digest of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...core.artefacts.digest_cache import digests_of_untouched
from ...core.artefacts.digests import digest_of_tensors, digest_of_tokenizer
from ...core.artefacts.files import read_json
from ...core.artefacts.licence_card import licence_on_card
from ...core.artefacts.model_config import LAYER_KEYS, is_tied, text_config
from ...core.artefacts.safetensors_io import Checkpoint, TensorEntry
from ...core.errors import UserError
from ...core.manifests.manifest import Manifest, manifest_path, read_manifest
from ...core.models.adapters.folder import is_adapter
from ...core.models.adapters.lora import Adapter
from ...core.models.loading import ExpertTensors, seed_of
from ..recipes.perturbation import Perturbation
from .quantized import BlockScales, block_scales, is_scale
from .tensor_names import HEADS, aligned_names, embedding_name, head_name, layer_names

DERIVED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
"""Name suffixes of buffers in old checkpoints that models recompute; `.attn.c_attn.bias` is not one."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one model: its location, and the adapter to apply to it."""

    entry: TensorEntry
    expected: str | None = None
    """Digest according to the manifest of its folder; None without a manifest."""
    adapter: Adapter | None = None
    """Adapter to apply to the tensor; None: no adapter."""
    scales: BlockScales | None = None
    """Scales of a quantized tensor; None: the stored numbers are the weights."""
    perturbation: Perturbation | None = None
    """Noise and factor for the numbers; None: neither."""

    @property
    def is_plain(self) -> bool:
        """Whether the stored numbers are used as they are."""
        return self.adapter is None and self.scales is None and self.perturbation is None

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> str:
        return self.entry.dtype


@dataclass(frozen=True, eq=False)
class Source:
    """One model of a merge. Its manifest is read once; headers and configuration are read once, at first use."""

    name: str
    folder: Path
    kind: str
    """`seed`, `expert`, `generalist`, `adapter`, or `model` for any other Hugging Face folder."""
    manifest: Manifest | None = None
    seed: Source | None = None
    """Seed of the merge, or the given base model of an adapter."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Tensors with another name in the leading model -> that name."""

    @cached_property
    def base(self) -> Source | None:
        """Model that an expert or adapter changes; None for a whole model."""
        if self.kind == "adapter":
            return self.seed
        if self.kind != "expert" or self.manifest is None:
            return None
        seed_digests = [parent.digest for parent in self.manifest.parents if parent.kind == "seed"]
        if self.seed is not None and self.seed.manifest is not None and self.seed.manifest.digest in seed_digests:
            return self.seed
        return open_source("seed", seed_of(self.folder, self.manifest))

    @property
    def root(self) -> Source:
        """The whole model below an expert or adapter."""
        return self if self.base is None else self.base.root

    @property
    def model_folder(self) -> Path:
        """Folder with `config.json` and tokenizer; for an expert, its seed's folder."""
        return self.root.folder

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Headers of the weights in the folder; for an expert, of the tensors that training changed."""
        if self.adapter is not None:
            return self.adapter.checkpoint
        if self.kind == "expert":
            changed = ExpertTensors(self.root.checkpoint, self.folder).changed
            assert isinstance(changed, Checkpoint), "the expert is not an adapter"
            return changed
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{self.folder} has no config.json: it is not a model folder, or it is unfinished")
        return Checkpoint.of_folder(self.folder)

    @cached_property
    def adapter(self) -> Adapter | None:
        """The adapter in the folder; None for other models. Raises `UserError` if it differs from its manifest."""
        if self.base is None or not is_adapter(self.folder):
            return None
        base, tied_head = {name: stored.entry for name, stored in self._adapted.items()}, self.root.tied_head
        tied = () if tied_head is None else (tied_head, embedding_name(base) or "")
        adapter = Adapter.open(self.folder, base, tied)
        if self.manifest is not None and adapter.digest != self.manifest.digest:
            raise UserError(
                f"the tensors of {self.folder} were changed: their digest differs from the manifest; restore or recreate it"
            )
        return adapter

    @cached_property
    def tied_head(self) -> str | None:
        """Name of the output head if it is the embedding and not stored by itself; None otherwise."""
        is_shared = embedding_name(self.tensors) is not None and head_name(self.tensors) is None
        return HEADS[0] if is_shared and is_tied(self.root.config) else None

    @property
    def _adapted(self) -> Mapping[str, StoredTensor]:
        """Tensors that an adapter can change: those of its base, with a tied output head beside the embedding."""
        tensors, tied_head = self.root.tensors, self.root.tied_head
        if tied_head is None:
            return tensors
        embedding = tensors[embedding_name(tensors) or ""]
        return {**tensors, tied_head: replace(embedding, entry=replace(embedding.entry, name=tied_head))}

    @cached_property
    def own(self) -> Mapping[str, StoredTensor]:
        """Tensors that differ from the base; all tensors of a whole model."""
        if self.base is not None and self.adapter is not None:
            adapted, tied_head = self._adapted, self.root.tied_head
            own = {name: replace(adapted[name], adapter=self.adapter) for name in self.adapter.changes}
            embedding = embedding_name(adapted)
            if tied_head is not None and embedding is not None:
                if self.adapter.replaces_alike(embedding, tied_head):
                    del own[tied_head]  # still tied
                elif embedding in own:
                    own.setdefault(tied_head, adapted[tied_head])  # the head keeps the old embedding
            return own
        expected = self.manifest.tensors if self.manifest is not None else {}
        entries = self.checkpoint.entries
        copies = self._tied_heads(entries) if self.base is None else ()
        scales = block_scales(self.folder, self.config, entries) if self.base is None else {}
        return {
            self.renamed.get(name, name): StoredTensor(
                self._renamed(entry), expected.get(name), scales=scales.get(name)
            )
            for name, entry in entries.items()
            if name not in copies and not is_scale(name, scales)
        }

    def _renamed(self, entry: TensorEntry) -> TensorEntry:
        return replace(entry, name=self.renamed[entry.name]) if entry.name in self.renamed else entry

    def _tied_heads(self, entries: Mapping[str, TensorEntry]) -> tuple[str, ...]:
        """Return the stored output heads that repeat the embedding; loading ties these, but keeps a different head."""
        embedding = embedding_name(entries)
        if embedding is None or not is_tied(self.config):
            return ()
        return tuple(name for name in HEADS if name in entries and entries[name].has_same_bytes(entries[embedding]))

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name."""
        return self.own if self.base is None else {**self.base.tensors, **self.own}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of `config.json`."""
        return read_json(self.folder / "config.json") if self.base is None else self.base.config

    @cached_property
    def num_layers(self) -> int:
        """Number of decoder layers, by the configuration or else by the names of the tensors."""
        config = text_config(self.config)
        stated = (config[key] for key in LAYER_KEYS if isinstance(config.get(key), int))
        return next(stated, len(layer_names(self.tensors).layers))

    @cached_property
    def licence(self) -> str | None:
        """Licence according to the manifest or the model card; None if neither has one."""
        return self.manifest.licence if self.manifest is not None else licence_on_card(self.folder)

    @cached_property
    def tokenizer(self) -> str:
        """Digest of the tokenizer files."""
        return digest_of_tokenizer(self.model_folder)

    @property
    def seed_digest(self) -> str | None:
        """Digest of the model's seed (its own for a seed); None if it is not recorded."""
        if self.manifest is None:
            return None
        if self.manifest.kind == "seed":
            return self.manifest.digest
        return next((parent.digest for parent in self.manifest.parents if parent.kind == "seed"), None)

    def digest(self, read: Mapping[TensorEntry, str]) -> str:
        """Return the digest of a model without a manifest; `read` holds digests computed during a merge."""
        if self.adapter is not None:
            return self.adapter.digest
        entries = {name: self._renamed(entry) for name, entry in self.checkpoint.entries.items()}
        known = {name: read[entry] for name, entry in entries.items() if entry in read}
        return digest_of_tensors(digests_of_untouched(self.checkpoint, known))


def open_source(name: str, folder: Path, seed: Source | None = None, *, allow_containers: bool = False) -> Source:
    """Open one model: an artefact, a Hugging Face folder, or an adapter of `seed`.

    Raises `UserError` for folders that are unfinished, and for generalists that contain several models, unless
    `allow_containers` is set; the first use of its tensors raises for weights that are damaged or pickled.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; merges need local model folders")
    if manifest_path(folder) is None:
        if (folder / "run.json").is_file():
            raise UserError(f"{folder} is not finished: it has a run.json, but no manifest; finish its training first")
        if not is_adapter(folder):
            return Source(name, folder, "model")
        if seed is None:
            raise UserError(
                f"{folder} is an adapter and needs the model it was trained on; give that model as the seed (base_model)"
            )
        return Source(name, folder, "adapter", seed=seed)
    manifest = read_manifest(folder)
    source = Source(name, folder, manifest.kind, manifest, seed)
    if manifest.kind == "expert" or allow_containers:
        return source
    if str(source.config.get("model_type", "")).startswith("expertctl_"):
        raise UserError(f"{folder} is a generalist that contains several models; merge its experts instead")
    return source


def open_sources(
    models: Mapping[str, Path],
    seed: str | None,
    adapter_bases: Mapping[str, Path] | None = None,
    *,
    allow_containers: bool = False,
) -> dict[str, Source]:
    """Open all models of a merge; the seed first, because experts and adapters are based on it."""
    sources: dict[str, Source] = {}
    if seed is not None:
        sources[seed] = open_source(seed, models[seed], allow_containers=allow_containers)
    for name, folder in models.items():
        if name != seed:
            base = sources[seed] if seed is not None else None
            if adapter_bases is not None and name in adapter_bases:
                base = open_source(f"base of {name}", adapter_bases[name])
            sources[name] = open_source(name, folder, base, allow_containers=allow_containers)
    return _with_aligned_names(sources)


def _with_aligned_names(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return the models, with the tensor names of the first one for whole models that have others."""
    first = next(iter(sources.values())).root
    aligned = dict(sources)
    for name, source in sources.items():
        if source.kind in ("model", "generalist") and source.folder != first.folder and _is_same_class(source, first):
            renamed = aligned_names((first.folder, first.tensors), (source.folder, source.tensors), DERIVED)
            aligned[name] = replace(source, renamed=renamed) if renamed else source
    return aligned


def _is_same_class(first: Source, second: Source) -> bool:
    """Return whether two models have the same class of transformers."""
    folders = (first.folder, second.folder)
    if not all((folder / "config.json").is_file() for folder in folders):
        return False  # reading their tensors reports it
    kinds = {str(model.config.get("model_type")) for model in (first, second)}
    return len(kinds) == 1 and not kinds.pop().startswith("expertctl_")
