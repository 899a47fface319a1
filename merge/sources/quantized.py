"""Dequantizes fp8 checkpoints with one scale per block of a weight, as DeepSeek and Qwen publish them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.model_config import quantization, refuse_quantized
from ...core.artefacts.numeric import decode
from ...core.artefacts.safetensors_io import TensorEntry
from ...core.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class BlockScales:
    """Scales of a weight, (ceil(rows / height), ceil(columns / width)), by which its codes are multiplied."""

    entry: TensorEntry
    block: tuple[int, int]
    """Height and width of a block."""

    def apply(self, codes: NDArray[Any]) -> NDArray[Any]:
        """Return the weight for its codes, both (rows, columns)."""
        import numpy as np

        scales = decode(self.entry.read(), self.entry.dtype, self.entry.shape).astype(codes.dtype)
        (height, width), (rows, columns) = self.block, codes.shape
        numbers: NDArray[Any] = codes * np.repeat(np.repeat(scales, height, axis=0)[:rows], width, axis=1)[:, :columns]
        return numbers


def block_scales(folder: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> dict[str, BlockScales]:
    """Return the scales of quantized weights by the weights' names; empty for a model that is not quantized.

    Raises `UserError` for other kinds of quantization, and for scales that do not fit their weight.
    """
    stated = quantization(config)
    if not stated:
        return {}
    block: list[int] = stated.get("weight_block_size") or []
    if stated.get("quant_method") != "fp8" or len(block) != 2:
        refuse_quantized(folder, config)
    scales = {}
    for name, entry in entries.items():
        if not name.endswith(_SUFFIX):
            continue
        weight = entries.get(name.removesuffix(_SUFFIX))
        wanted = (
            ()
            if weight is None
            else tuple(-(-size // length) for size, length in zip(weight.shape, block, strict=False))
        )
        if weight is None or len(weight.shape) != 2 or entry.shape != wanted:
            raise UserError(
                f"{folder}: the scales '{name}', {list(entry.shape)}, do not fit a weight in blocks of {block}"
            )
        scales[weight.name] = BlockScales(entry, (block[0], block[1]))
    codes = next((name for name, entry in entries.items() if entry.dtype.startswith("F8") and name not in scales), None)
    if codes is not None:
        raise UserError(f"{folder}: the quantized tensor '{codes}' has no scales '{codes}{_SUFFIX}'")
    return scales


def is_scale(name: str, scales: Mapping[str, BlockScales]) -> bool:
    """Return whether a stored tensor holds scales."""
    return name.removesuffix(_SUFFIX) in scales and name.endswith(_SUFFIX)
