"""Caches of a batch whose rows come and go: rows are appended, selected, and trimmed of common padding on the left.

Works on `DynamicCache` with full and sliding-window attention, and on caches with an `append_rows` and a `drop_columns` of
their own, such as those of ensembles. Shapes of keys and values: (B, heads, columns, width).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from torch import Tensor


def can_append(cache: Any) -> bool:
    """Return whether rows can be appended to a cache."""
    own = getattr(cache, "can_append", None)
    if own is not None:
        return bool(own())
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def append_rows(cache: Any, other: Any) -> None:
    """Append the rows of another cache of the same model; the shorter texts get empty columns on the left."""
    if hasattr(cache, "append_rows"):
        cache.append_rows(other)
        return
    for layer, new in zip(cache.layers, other.layers, strict=True):
        layer.keys, layer.values = _stacked(layer.keys, new.keys), _stacked(layer.values, new.values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = max(layer.cumulative_length, new.cumulative_length)


def drop_columns(cache: Any, count: int) -> None:
    """Remove columns on the left, which are padding in all rows."""
    if hasattr(cache, "drop_columns"):
        cache.drop_columns(count)
        return
    for layer in cache.layers:
        kept = layer.get_seq_length() - count
        keys, values = layer.keys, layer.values
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = kept
            kept = min(kept, keys.shape[-2])
        first = keys.shape[-2] - kept
        layer.keys, layer.values = keys[..., first:, :], values[..., first:, :]


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    columns = max(first.shape[-2], second.shape[-2])
    return torch.cat([_padded(first, columns), _padded(second, columns)])


def _padded(tensor: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, columns - tensor.shape[-2], 0))
