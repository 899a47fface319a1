"""Rotary positions (RoPE) of keys, by the functions of the model's own family.

Shapes: B = batch, H = heads, L = columns of the cache, D = width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....core.errors import UserError

Rotate = Callable[[Tensor, Tensor], Tensor]
"""`rotate(keys_BHLD, positions_BL)` moves keys by so many positions, forwards or backwards."""
CHANGING = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies depend on the length of the text."""
TOLERANCE = 1e-2


def rotation_of(model: PreTrainedModel) -> Rotate:
    """Return how a model rotates keys; raises `UserError` if it has other positions than RoPE.

    The rotation is compared with the model's own keys of a few tokens at other positions, so that no family has to be known.
    """
    kind = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if kind.get("rope_type") in CHANGING:
        raise _refused(model, f"its RoPE is of the kind '{kind['rope_type']}', which depends on the length of the text")
    rotary = next((module.rotary_emb for module in model.modules() if hasattr(module, "rotary_emb")), None)
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if not isinstance(rotary, nn.Module) or apply is None:
        raise _refused(model, "it has no rotary position embedding")
    rotate = _rotation(rotary, apply)
    _check(model, rotate)
    return rotate


def _rotation(rotary: Any, apply: Any) -> Rotate:
    def rotate(keys_BHLD: Tensor, positions_BL: Tensor) -> Tensor:
        exact = keys_BHLD.float()
        cos, sin = rotary(exact, positions_BL)
        width = cos.shape[-1]  # some families rotate the first elements of a head only
        rotated = apply(exact[..., :width], exact[..., :width], cos, sin)[1]
        return torch.cat((rotated, exact[..., width:]), dim=-1).to(keys_BHLD.dtype)

    return rotate


@torch.no_grad()
def _check(model: PreTrainedModel, rotate: Rotate) -> None:
    """Compare the keys of tokens at positions 0, 1 ... with those at later positions, in all layers."""
    ids_BT = torch.arange(1, 5, device=model.device)[None]
    positions_BT = torch.arange(4, device=model.device)[None]
    near, far = (
        model(input_ids=ids_BT, position_ids=positions_BT + shift, use_cache=True).past_key_values.layers
        for shift in (0, 9)
    )
    for layer, moved in zip(near, far, strict=True):
        try:
            keys = rotate(rotate(layer.keys, -positions_BT), positions_BT + 9)
        except (RuntimeError, TypeError, ValueError):  # keys of another shape than the function expects
            keys = None
        if keys is None or not _agree(keys, moved.keys) or not _agree(layer.values, moved.values):
            raise _refused(model, "its keys are not those of a plain rotary position embedding")


def _agree(first: Tensor, second: Tensor) -> bool:
    scale = second.float().abs().max().clamp(min=1e-6)
    return bool(((first.float() - second.float()).abs().max() / scale) < TOLERANCE)


def _refused(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"attention sinks do not fit models of type '{model.config.model_type}': {reason}; generate within the model's positions"
    )
