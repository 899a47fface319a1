"""The tensors of a GGUF file: their names, their order of rows, and their dtypes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....core.artefacts.safetensors_io import torch_dtype
from ....core.errors import UserError
from ....core.hooks.evaluation import ExportInputs
from ....core.models.loading import read_config
from .families import Family
from .metadata import Metadata, rope_factors

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""Values of the option `dtype` -> names that safetensors and GGUF share."""
_EXPERT = re.compile(r"^(?P<module>.+\.experts)\.(?P<expert>\d+)\.(?P<rest>.+)$")
_QUERIES, _KEYS = re.compile(r"\.q_proj\.(weight|bias)$"), re.compile(r"\.k_proj\.(weight|bias)$")
_RECOMPUTED = (".rotary_emb.inv_freq",)
_ALWAYS_F32 = ("_norm.weight", ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file, and how it is made from those of the model."""

    name: str
    sources: tuple[str, ...]
    """Tensors of the model: one, or that of every expert in order; none for a constant."""
    dtype: str
    shape: tuple[int, ...]
    num_heads: int | None = None
    """Number of heads whose rows are reordered for RoPE in neighbouring pairs; None: no reordering."""
    is_stacked: bool = False
    constant: Tensor | None = None

    def make(self, model: ExportInputs) -> Tensor:
        """Return the content; raises `UserError` for numbers that the dtype cannot hold."""
        import torch

        if self.constant is not None:
            return self.constant
        parts = [self.part(model, name) for name in self.sources]
        parts = [_to_pairs(part, self.num_heads) if self.num_heads is not None else part for part in parts]
        return (torch.stack(parts) if self.is_stacked else parts[0]).reshape(self.shape).contiguous()

    def part(self, model: ExportInputs, name: str) -> Tensor:
        """Return one of the model's tensors in the dtype of the file."""
        import torch

        numbers = model.tensors.read(name)
        rounded = numbers.to(torch_dtype(self.dtype))
        if bool((torch.isinf(rounded) & torch.isfinite(numbers)).any()):
            raise UserError(f"tensor '{name}' has numbers too large for {self.dtype.lower()}; use dtype bf16 or f32")
        return rounded

    def undo(self, content: Tensor) -> list[Tensor]:
        """Return the model's tensors that a content was made from, flattened, in the order of `sources`."""
        parts = list(content) if self.is_stacked else [content]
        return [(_to_halves(part, self.num_heads) if self.num_heads is not None else part).flatten() for part in parts]


def _to_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head so that the two that RoPE rotates together are neighbours, as llama.cpp expects."""
    return tensor.reshape(num_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _to_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo `_to_pairs`."""
    rows = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return rows.movedim(2, 1).reshape(tensor.shape)


def plan_tensors(model: ExportInputs, family: Family, dtype: str) -> list[GgufTensor]:
    """Return the tensors of the file; raises `UserError` for a tensor that the family has no place for."""
    import gguf

    config = read_config(model.files)
    shapes = model.tensors.shapes()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture], config.num_hidden_layers)
    tensors = []
    for merged, sources in _grouped(list(shapes)).items():
        name = names.get_name(merged, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                f"GGUF has no place for the tensor '{sources[0]}' of '{model.name}' in the architecture "
                f"'{gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.architecture]]}'; export with --to safetensors"
            )
        stored, shape = shapes[sources[0]]
        if any(shapes[source] != (stored, shape) for source in sources):
            raise UserError(f"the experts' tensors '{merged}' of '{model.name}' differ in shape or dtype")
        is_stacked = sources != (merged,)
        heads = config.num_attention_heads if _QUERIES.search(merged) else None
        heads = config.num_key_value_heads if _KEYS.search(merged) else heads
        if name.endswith(".ffn_gate_inp_shexp.weight"):
            shape = shape[-1:]  # of a single gate; llama.cpp has a vector
        tensors.append(
            GgufTensor(
                name,
                sources,
                _dtype(name, shape, stored, dtype),
                (len(sources), *shape) if is_stacked else shape,
                heads if family.pairs_rotated else None,
                is_stacked,
            )
        )
    if family.repeats_tied_head and _HEAD not in shapes:
        stored, shape = shapes[_EMBEDDING]
        tensors.append(GgufTensor("output.weight", (_EMBEDDING,), _dtype("output.weight", shape, stored, dtype), shape))
    factors = rope_factors(config, Metadata.of(model, family).head_dim)
    if factors is not None:
        tensors.append(GgufTensor("rope_freqs.weight", (), "F32", tuple(factors.shape), constant=factors))
    return tensors


def _grouped(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the model's tensors by the name that their stack has; a tensor that is no expert's is its own stack."""
    stacks: dict[str, dict[int, str]] = {}
    for name in names:
        if name.endswith(_RECOMPUTED):
            continue
        match = _EXPERT.match(name)
        key, expert = (f"{match['module']}.{match['rest']}", int(match["expert"])) if match else (name, 0)
        stacks.setdefault(key, {})[expert] = name
    return {key: tuple(experts[expert] for expert in sorted(experts)) for key, experts in stacks.items()}


def _dtype(name: str, shape: tuple[int, ...], stored: str, dtype: str) -> str:
    if len(shape) == 1 or name.endswith(_ALWAYS_F32):
        return "F32"
    if dtype != "auto":
        return DTYPES[dtype]
    return stored if stored in DTYPES.values() else "F32"
