"""PEFT LoRA adapters as experts, applied exactly to the tensors of their base model.

Adapters that cannot be applied exactly are refused. Factors A and B are never averaged, because the product of means is
not the mean of products: a merge uses the full tensors of the adapted model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artefacts.digests import digest_of_tensors
from ...artefacts.files import read_json
from ...artefacts.numeric import decode
from ...artefacts.safetensors_io import Checkpoint, TensorEntry
from ...errors import UserError
from ..stored_names import loaded_names
from .folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .prompts import refuse_prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_UNSUPPORTED = {
    "layer_replication": "it repeats layers of the base model",
    "alora_invocation_tokens": "it is switched on by tokens (aLoRA)",
    "use_qalora": "it pools its inputs (QALoRA)",
    "trainable_token_indices": "it trains embedding rows of single tokens",
    "target_parameters": "it changes parameters that are not the weight of a module",
    "megatron_config": "it belongs to a Megatron model",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it adapts singular values",
    "velora_config": "it compresses activations",
    "monteclora_config": "it samples its factors",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base model, so that the published base model does not fit the adapter."""
_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector(?:\.weight)?)$"
)


@dataclass(frozen=True)
class _Change:
    """The change of one tensor of the base model."""

    scale: float = 1.0
    a: TensorEntry | None = None
    b: TensorEntry | None = None
    magnitude: TensorEntry | None = None
    """DoRA: the norm of each output row; None: no DoRA."""
    added: TensorEntry | None = None
    """Added to the tensor, multiplied by `scale` (the bias of B)."""
    replaced_by: TensorEntry | None = None
    """Replaces the base model's tensor; factors, if any, are applied to it."""
    is_transposed: bool = False
    """Whether the tensor has shape (in, out): an embedding, or a weight that the base model stores transposed."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter, checked against the headers of its base model."""

    checkpoint: Checkpoint
    changes: Mapping[str, _Change]
    """Changed tensors of the base model, by name."""

    @classmethod
    def open(cls, folder: Path, base: Mapping[str, TensorEntry], tied: Collection[str] = ()) -> Adapter:
        """Open an adapter folder without reading tensors; raises `UserError` if it cannot be merged exactly.

        `base` holds the base model's tensors; `tied` names those that are the embedding and the output head at once.
        """
        config = read_json(folder / ADAPTER_CONFIG)
        refuse_prompt(folder, "merging tensors")
        _check_config(folder, config)
        weights = folder / ADAPTER_WEIGHTS
        if not weights.is_file():
            raise UserError(
                f"{folder} has no {ADAPTER_WEIGHTS}; pickled weights (.bin) are refused because loading them can run code: "
                "save the adapter again with safe_serialization=True"
            )
        checkpoint = Checkpoint([weights])
        return cls(checkpoint, _Matcher(folder, config, checkpoint, base, tied).changes())

    def replaces_alike(self, first: str, second: str) -> bool:
        """Return whether the adapter replaces two tensors by the same bytes."""
        new = [self.changes[name].replaced_by if name in self.changes else None for name in (first, second)]
        return new[0] is not None and new[1] is not None and new[0].has_same_bytes(new[1])

    @cached_property
    def digest(self) -> str:
        """Digest of the adapter's tensors."""
        return digest_of_tensors(self.checkpoint.digests())

    def apply(self, name: str, numbers: NDArray[Any]) -> NDArray[Any]:
        """Return the adapted tensor for a tensor of the base model, in the same dtype."""
        change = self.changes[name]
        if change.replaced_by is not None:
            numbers = _read(change.replaced_by).astype(numbers.dtype)
            if change.a is None:
                return numbers
        added: NDArray[Any]
        if change.added is not None:
            added = _read(change.added)
        else:
            assert change.a is not None
            assert change.b is not None
            added = _read(change.b) @ _read(change.a)
            if change.magnitude is not None:
                return _with_magnitude(numbers, added * change.scale, _read(change.magnitude), change.is_transposed)
            if change.is_transposed:
                added = added.T
        adapted: NDArray[Any] = numbers + (added * change.scale).astype(numbers.dtype)
        return adapted


class AdaptedTensors:
    """The tensors of a base model that an adapter changes, computed when they are read, in float32 or float64."""

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self._adapter = Adapter.open(folder, base.entries)
        self.entries = {name: base.entry(name) for name in self._adapter.changes}

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def read(self, name: str) -> Tensor:
        import torch

        return torch.from_numpy(self._adapter.apply(name, _read(self.entries[name])))

    def span(self, name: str, begin: int, end: int) -> Tensor:
        """Return the elements `begin` to `end` of one tensor in row-major order, shape (end - begin,)."""
        return self.read(name).flatten()[begin:end]


def _with_magnitude(
    numbers: NDArray[Any], delta: NDArray[Any], magnitude: NDArray[Any], transposed: bool
) -> NDArray[Any]:
    """Return m * (W + dW) / |W + dW| per output row (DoRA, arXiv:2402.09353, section 4.1)."""
    import numpy as np

    weight = (numbers.T if transposed else numbers) + delta
    length = np.sqrt((weight.astype("f8") ** 2).sum(axis=1))
    scaled = weight * (magnitude.reshape(-1) / length)[:, None]
    return np.ascontiguousarray((scaled.T if transposed else scaled).astype(numbers.dtype))


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise UserError(f"{folder} is an adapter of type {peft_type}; only LoRA adapters can be merged exactly")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise UserError(f"{folder} cannot be merged exactly: {reason} ('{key}' in {ADAPTER_CONFIG})")
    initialisation = config.get("init_lora_weights")
    if isinstance(initialisation, str) and initialisation.lower().startswith(_CHANGED_BASE):
        raise UserError(
            f"{folder} cannot be merged exactly: its initialisation '{initialisation}' changed the base model's weights; "
            "convert it with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


@dataclass(frozen=True)
class _Matcher:
    """Maps the tensors of an adapter to the tensors of its base model."""

    folder: Path
    config: Mapping[str, Any]
    adapter: Checkpoint
    base: Mapping[str, TensorEntry]
    tied: Collection[str]

    def changes(self) -> dict[str, _Change]:
        factors: dict[str, dict[str, TensorEntry]] = {}
        changes: dict[str, _Change] = {}
        for key, entry in self.adapter.entries.items():
            name = key.removeprefix("base_model.model.").removeprefix("base_model.")
            match = _FACTOR.match(name)
            if match is not None:
                factors.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = entry
                continue
            base_entry = self._base_entry(name.replace(".base_layer.", ".").replace(".modules_to_save.", "."), key)
            if entry.shape != base_entry.shape:
                raise self._refusal(
                    f"'{key}' is {list(entry.shape)}, but the base model's '{base_entry.name}' is {list(base_entry.shape)}"
                )
            changes[base_entry.name] = _Change(replaced_by=entry)
        for module, parts in factors.items():
            for target, change in self._factor_changes(module, parts).items():
                base = changes[target].replaced_by if target in changes else None
                changes[target] = replace(change, replaced_by=base)
        if not changes:
            raise self._refusal("it changes nothing")
        return changes

    def _factor_changes(self, module: str, parts: Mapping[str, TensorEntry]) -> dict[str, _Change]:
        is_embedding = "lora_embedding_A" in parts
        a, b = (parts.get(f"lora_{'embedding_' if is_embedding else ''}{factor}") for factor in "AB")
        if a is None or b is None:
            raise self._refusal(f"'{module}' has only one of its factors A and B")
        weight = self._base_entry(f"{module}.weight", module)
        magnitude = parts.get("lora_magnitude_vector")
        if is_embedding and magnitude is not None:
            raise self._refusal(f"it adapts the embedding '{module}' with DoRA")
        if weight.name in self.tied:
            raise self._refusal(
                f"it adapts '{weight.name}', which the base model shares between embedding and output head"
            )
        is_transposed = is_embedding or bool(self.config.get("fan_in_fan_out"))
        self._check_factors(module, weight, a, b, is_transposed)
        scale = self._scale(module, a.shape[0])
        changes = {weight.name: _Change(scale, a, b, magnitude, is_transposed=is_transposed)}
        if "lora_B.bias" in parts:
            bias = self._base_entry(f"{module}.bias", f"{module}.lora_B.bias")
            changes[bias.name] = _Change(scale, added=parts["lora_B.bias"])
        return changes

    def _check_factors(
        self, module: str, weight: TensorEntry, a: TensorEntry, b: TensorEntry, is_transposed: bool
    ) -> None:
        if len(weight.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise self._refusal(
                f"'{module}' has factors {list(b.shape)} and {list(a.shape)} for a weight {list(weight.shape)}; only matrices "
                "are supported"
            )
        product = (a.shape[1], b.shape[0]) if is_transposed else (b.shape[0], a.shape[1])
        if product != weight.shape:
            raise self._refusal(
                f"the product of its factors for '{module}' is {list(product)}, but the base model's '{weight.name}' is "
                f"{list(weight.shape)}"
            )

    def _scale(self, module: str, rank: int) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
        alpha_patterns = self.config.get("alpha_pattern") or {}
        alpha = next(
            (value for key, value in alpha_patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
            self.config.get("lora_alpha", rank),
        )
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _base_entry(self, name: str, key: str) -> TensorEntry:
        """Return the base model's entry of a tensor; checkpoints may lack prefixes of module names."""
        for candidate in (name, *(name[match.end() :] for match in re.finditer(r"\.", name))):
            if candidate in self.base:
                return self.base[candidate]
        longer_names = [base_name for base_name in self.base if base_name.endswith(f".{name}")]
        if len(longer_names) == 1:
            return self.base[longer_names[0]]
        file_name = self._names_in_memory.get(name)
        if file_name is not None:
            return self.base[file_name]
        raise self._refusal(f"it changes '{name}' (by '{key}'), which the base model does not have")

    @cached_property
    def _names_in_memory(self) -> dict[str, str]:
        """Tensors of the base model by their names in memory, which adapters have, where its files have others."""
        folder = next(entry.file.parent for entry in self.base.values())
        return {memory: name for name, (memory, is_whole) in loaded_names(folder, self.base).items() if is_whole}

    def _refusal(self, reason: str) -> UserError:
        base = next((entry.file.parent for entry in self.base.values()), "its base")
        return UserError(f"adapter {self.folder} cannot be merged exactly into {base}: {reason}")


def _read(entry: TensorEntry) -> NDArray[Any]:
    return decode(entry.read(), entry.dtype, entry.shape)
