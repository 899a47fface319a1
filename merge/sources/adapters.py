"""PEFT LoRA adapters as experts: each applied to the tensor it was trained on, exactly, or refused.

An adapter's factors A and B are never averaged with others': the product of means is not the mean of products. A merge
sees the whole tensors that the adapted model has.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.files import read_json, readable_os_errors
from ...core.artefacts.lineage import digest_of_tensors
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
    "trainable_token_indices": "it trains single tokens' rows",
    "target_parameters": "it changes parameters that are no module's weight",
    "megatron_config": "it belongs to a Megatron model",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it adapts singular values",
    "velora_config": "it compresses activations",
    "monteclora_config": "it samples its factors",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base model's weights: what is on the hub is not what the adapter stands on."""
_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector(?:\.weight)?)$"
)


@dataclass(frozen=True)
class _Change:
    """What happens to one tensor of the base model."""

    scale: float = 1.0
    a: TensorEntry | None = None
    b: TensorEntry | None = None
    magnitude: TensorEntry | None = None
    """DoRA: the length of every output's row."""
    added: TensorEntry | None = None
    """Added, times `scale`: the bias of B."""
    replaced_by: TensorEntry | None = None
    """Taken instead of the base model's; factors, where there are any, change it."""
    transposed: bool = False
    """The weight is stored as (in, out)."""
    is_embedding: bool = False


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter, opened by its header and checked against the base model's."""

    folder: Path
    base_model: str | None
    """What its configuration calls the model it was trained on."""
    changes: Mapping[str, _Change] = field(repr=False)

    @property
    def changed(self) -> frozenset[str]:
        """Names of the base model's tensors that it changes."""
        return frozenset(self.changes)

    @classmethod
    def open(cls, folder: Path, base: Checkpoint) -> Adapter:
        """Open an adapter folder; raises `UserError` for whatever cannot be merged exactly. Reads no tensor."""
        config = read_json(folder / ADAPTER_CONFIG)
        _check_config(folder, config)
        weights = folder / ADAPTER_WEIGHTS
        if not weights.is_file():
            raise UserError(
                f"{folder} has no {ADAPTER_WEIGHTS}; pickled weights (.bin) can run code when loaded and are never "
                "opened here: load and save the adapter once with safe_serialization=True"
            )
        changes = _Matcher(folder, config, Checkpoint([weights]), base).changes()
        return cls(folder, config.get("base_model_name_or_path"), changes)

    def apply(self, name: str, numbers: NDArray[Any]) -> NDArray[Any]:
        """Return a base model's tensor as the adapted model has it, in the dtype it is given."""
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
    """Return m * (W + dW) / |W + dW|, row by row of the outputs (DoRA, arXiv:2402.09353, section 4.1)."""
    import numpy as np

    weight = (numbers.T if transposed else numbers) + delta
    length = np.sqrt((weight.astype("f8") ** 2).sum(axis=1))
    scaled = weight * (magnitude.reshape(-1) / length)[:, None]
    return np.ascontiguousarray((scaled.T if transposed else scaled).astype(numbers.dtype))


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} is an adapter of type {kind}; only LoRA adapters can be merged exactly")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise UserError(f"{folder} cannot be merged exactly: {reason} ('{key}' in {ADAPTER_CONFIG})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise UserError(
            f"{folder} cannot be merged exactly: its initialisation '{start}' changed the base model's weights; "
            "convert it with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if config.get("runtime_config", {}) and (config["runtime_config"] or {}).get("ephemeral_gpu_offload"):
        return  # where it ran says nothing about what it is


class _Matcher:
    """Finds for every tensor of an adapter the base model's tensor that it changes."""

    def __init__(self, folder: Path, config: Mapping[str, Any], own: Checkpoint, base: Checkpoint) -> None:
        self.folder, self.config, self.own, self.base = folder, config, own, base

    def changes(self) -> dict[str, _Change]:
        """Return what happens to each tensor of the base model that is changed."""
        factors: dict[str, dict[str, TensorEntry]] = {}
        found: dict[str, _Change] = {}
        for key, entry in self.own.entries.items():
            plain = _without_prefix(key)
            match = _FACTOR.match(plain)
            if match is not None:
                factors.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = entry
                continue
            target = plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            found[self._target(target, key)] = self._replacement(target, key, entry)
        for module, parts in factors.items():
            for target, change in self._factor_changes(module, parts).items():
                base = found[target].replaced_by if target in found else None
                found[target] = replace(change, replaced_by=base)
        if not found:
            raise self._refusal("it changes nothing")
        return found

    def _replacement(self, target: str, key: str, entry: TensorEntry) -> _Change:
        ours = self.base.entry(self._target(target, key))
        if entry.shape != ours.shape:
            raise self._refusal(
                f"'{key}' is {list(entry.shape)}, but the base model's '{ours.name}' is {list(ours.shape)}"
            )
        return _Change(replaced_by=entry)

    def _factor_changes(self, module: str, parts: Mapping[str, TensorEntry]) -> dict[str, _Change]:
        is_embedding = "lora_embedding_A" in parts
        a, b = (parts.get(f"lora_{'embedding_' if is_embedding else ''}{one}") for one in "AB")
        if a is None or b is None:
            raise self._refusal(f"'{module}' has only one of its factors A and B")
        target = self._target(f"{module}.weight", module)
        magnitude = parts.get("lora_magnitude_vector")
        if is_embedding and magnitude is not None:
            raise self._refusal(f"it adapts the embedding '{module}' with DoRA")
        if target.endswith(TOKEN_EMBEDDINGS) and not any(head in self.base for head in HEADS):
            raise self._refusal(
                f"it adapts '{target}', which the base model uses as its output head too: adapted, the two differ"
            )
        transposed = self._check_factors(module, target, a, b, is_embedding)
        scale = self._scale(module, a.shape[0])
        found = {target: _Change(scale, a, b, magnitude, None, None, transposed, is_embedding)}
        if "lora_B.bias" in parts:
            found[self._target(f"{module}.bias", f"{module}.lora_B.bias")] = _Change(
                scale, added=parts["lora_B.bias"]
            )
        return found

    def _check_factors(
        self, module: str, target: str, a: TensorEntry, b: TensorEntry, is_embedding: bool
    ) -> bool:
        """Return whether the base stores the weight transposed; raises `UserError` where factors do not fit."""
        ours = self.base.entry(target).shape
        if len(ours) != 2 or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise self._refusal(
                f"'{module}' has factors {list(b.shape)} and {list(a.shape)} for a weight {list(ours)}; only matrices "
                "are merged"
            )
        product = (b.shape[0], a.shape[1])
        transposed = bool(self.config.get("fan_in_fan_out")) and not is_embedding
        expected = product[::-1] if transposed or is_embedding else product
        if expected != ours:
            raise self._refusal(
                f"the product of its factors for '{module}' is {list(expected)}, but the base model's '{target}' is "
                f"{list(ours)}"
            )
        return transposed

    def _scale(self, module: str, rank: int) -> float:
        """Return alpha over the rank, or over its root (rsLoRA, arXiv:2312.03732)."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next(
            (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
            self.config.get("lora_alpha", rank),
        )
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _target(self, name: str, key: str) -> str:
        """Return the base model's name of a tensor: checkpoints may lack the outermost module's name."""
        candidates = [name, *(name[match.end() :] for match in re.finditer(r"\.", name))]
        for candidate in candidates:
            if candidate in self.base:
                return candidate
        longer = [one for one in self.base if one.endswith(f".{name}")]
        if len(longer) == 1:
            return longer[0]
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
    with readable_os_errors(entry.file), entry.file.open("rb", buffering=0) as file:
        raw = os.pread(file.fileno(), entry.num_bytes, entry.begin)
    return decode(raw, entry.dtype, entry.shape)
