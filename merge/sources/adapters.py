"""PEFT LoRA adapters as experts, applied exactly to the tensors of their base model.

Adapters that cannot be applied exactly are refused. Factors A and B are never averaged, because the product of means is
not the mean of products: a merge uses the full tensors of the adapted model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.digests import digest_of_tensors
from ...core.artefacts.files import os_errors_as_user_errors, read_json
from ...core.artefacts.numeric import decode
from ...core.artefacts.safetensors_io import Checkpoint, TensorEntry
from ...core.errors import UserError
from .tensor_names import HEADS, TOKEN_EMBEDDINGS

if TYPE_CHECKING:
    from numpy.typing import NDArray

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIXES = ("base_model.model.", "base_model.")
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
    transposed: bool = False
    """Whether the weight has shape (in, out)."""
    is_embedding: bool = False


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter, checked against the headers of its base model."""

    folder: Path
    base_model: str | None
    """Base model according to the adapter's configuration."""
    changes: Mapping[str, _Change] = field(repr=False)

    @property
    def changed(self) -> frozenset[str]:
        """Names of the changed tensors of the base model."""
        return frozenset(self.changes)

    @classmethod
    def open(cls, folder: Path, base: Checkpoint) -> Adapter:
        """Open an adapter folder without reading tensors.

        Raises `UserError` if the adapter cannot be merged exactly.
        """
        config = read_json(folder / ADAPTER_CONFIG)
        _check_config(folder, config)
        weights = folder / ADAPTER_WEIGHTS
        if not weights.is_file():
            raise UserError(
                f"{folder} has no {ADAPTER_WEIGHTS}; pickled weights (.bin) are refused because loading them can run code: "
                "save the adapter again with safe_serialization=True"
            )
        changes = _Matcher(folder, config, Checkpoint([weights]), base).changes()
        return cls(folder, config.get("base_model_name_or_path"), changes)

    def apply(self, name: str, numbers: NDArray[Any]) -> NDArray[Any]:
        """Return the adapted tensor for a tensor of the base model, in the same dtype."""
        result: NDArray[Any] = self._changed(name, numbers)
        return result

    def _changed(self, name: str, numbers: NDArray[Any]) -> Any:
        change = self.changes[name]
        if change.replaced_by is not None:
            numbers = _read(change.replaced_by).astype(numbers.dtype)
            if change.a is None:
                return numbers
        if change.added is not None:
            return numbers + (_read(change.added) * change.scale).astype(numbers.dtype)
        assert change.a is not None
        assert change.b is not None
        product = _read(change.b) @ _read(change.a)
        if change.is_embedding:
            return numbers + (product.T * change.scale).astype(numbers.dtype)
        if change.magnitude is None:
            delta = product.T if change.transposed else product
            return numbers + (delta * change.scale).astype(numbers.dtype)
        return _with_magnitude(numbers, product * change.scale, _read(change.magnitude), change.transposed)

    def digest(self) -> str:
        """Return the digest of the adapter's tensors."""
        return digest_of_tensors(Checkpoint([self.folder / ADAPTER_WEIGHTS]).digests())


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


class _Matcher:
    """Maps the tensors of an adapter to the tensors of its base model."""

    def __init__(self, folder: Path, config: Mapping[str, Any], adapter: Checkpoint, base: Checkpoint) -> None:
        self.folder, self.config, self.adapter, self.base = folder, config, adapter, base

    def changes(self) -> dict[str, _Change]:
        """Return the change of each changed tensor of the base model."""
        factors: dict[str, dict[str, TensorEntry]] = {}
        changes_by_name: dict[str, _Change] = {}
        for key, entry in self.adapter.entries.items():
            name = _without_prefix(key)
            match = _FACTOR.match(name)
            if match is not None:
                factors.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = entry
                continue
            target = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            changes_by_name[self._target(target, key)] = self._replacement(target, key, entry)
        for module, parts in factors.items():
            for target, change in self._factor_changes(module, parts).items():
                base = changes_by_name[target].replaced_by if target in changes_by_name else None
                changes_by_name[target] = replace(change, replaced_by=base)
        if not changes_by_name:
            raise self._refusal("it changes nothing")
        return changes_by_name

    def _replacement(self, target: str, key: str, entry: TensorEntry) -> _Change:
        base_entry = self.base.entry(self._target(target, key))
        if entry.shape != base_entry.shape:
            raise self._refusal(
                f"'{key}' is {list(entry.shape)}, but the base model's '{base_entry.name}' is {list(base_entry.shape)}"
            )
        return _Change(replaced_by=entry)

    def _factor_changes(self, module: str, parts: Mapping[str, TensorEntry]) -> dict[str, _Change]:
        is_embedding = "lora_embedding_A" in parts
        a, b = (parts.get(f"lora_{'embedding_' if is_embedding else ''}{factor}") for factor in "AB")
        if a is None or b is None:
            raise self._refusal(f"'{module}' has only one of its factors A and B")
        target = self._target(f"{module}.weight", module)
        magnitude = parts.get("lora_magnitude_vector")
        if is_embedding and magnitude is not None:
            raise self._refusal(f"it adapts the embedding '{module}' with DoRA")
        if target.endswith(TOKEN_EMBEDDINGS) and not any(head in self.base for head in HEADS):
            raise self._refusal(f"it adapts '{target}', which the base model also uses as output head")
        transposed = self._check_factors(module, target, a, b, is_embedding)
        scale = self._scale(module, a.shape[0])
        changes = {target: _Change(scale, a, b, magnitude, None, None, transposed, is_embedding)}
        if "lora_B.bias" in parts:
            changes[self._target(f"{module}.bias", f"{module}.lora_B.bias")] = _Change(
                scale, added=parts["lora_B.bias"]
            )
        return changes

    def _check_factors(self, module: str, target: str, a: TensorEntry, b: TensorEntry, is_embedding: bool) -> bool:
        """Return whether the base model stores the weight transposed; raises `UserError` if the factors do not fit."""
        base_shape = self.base.entry(target).shape
        if len(base_shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise self._refusal(
                f"'{module}' has factors {list(b.shape)} and {list(a.shape)} for a weight {list(base_shape)}; only matrices "
                "are supported"
            )
        product = (b.shape[0], a.shape[1])
        transposed = bool(self.config.get("fan_in_fan_out")) and not is_embedding
        expected = product[::-1] if transposed or is_embedding else product
        if expected != base_shape:
            raise self._refusal(
                f"the product of its factors for '{module}' is {list(expected)}, but the base model's '{target}' is "
                f"{list(base_shape)}"
            )
        return transposed

    def _scale(self, module: str, rank: int) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
        alpha_patterns = self.config.get("alpha_pattern") or {}
        alpha = next(
            (value for key, value in alpha_patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
            self.config.get("lora_alpha", rank),
        )
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _target(self, name: str, key: str) -> str:
        """Return the base model's name of a tensor; checkpoints may lack prefixes of module names."""
        candidates = [name, *(name[match.end() :] for match in re.finditer(r"\.", name))]
        for candidate in candidates:
            if candidate in self.base:
                return candidate
        longer_names = [base_name for base_name in self.base if base_name.endswith(f".{name}")]
        if len(longer_names) == 1:
            return longer_names[0]
        raise self._refusal(f"it changes '{name}' (by '{key}'), which the base model does not have")

    def _refusal(self, reason: str) -> UserError:
        base = next(iter(self.base.files), None)
        return UserError(
            f"adapter {self.folder} cannot be merged exactly into {base.parent if base else 'its base'}: {reason}"
        )


def _without_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _read(entry: TensorEntry) -> NDArray[Any]:
    with os_errors_as_user_errors(entry.file), entry.file.open("rb", buffering=0) as file:
        raw = os.pread(file.fileno(), entry.num_bytes, entry.begin)
    return decode(raw, entry.dtype, entry.shape)
