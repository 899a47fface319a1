"""The attention kernel of a run (`training.attention`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ....core.errors import UserError, first_line

if TYPE_CHECKING:
    from ....core.config.settings import TrainingConfig


def choose_attention(module: nn.Module, config: TrainingConfig, device: torch.device, *, bfloat16: bool) -> None:
    """Let a model compute attention as the setting says; `auto` leaves it as it is.

    Raises `UserError` if the model's class, the device, the precision or this installation does not offer it.
    """
    from transformers import PreTrainedModel

    name = config.attention
    if name == "auto":
        return
    if name in ("flash_attention_2", "flex_attention") and device.type != "cuda":
        raise _refused(name, f"training with it needs a GPU, and this run is on {device.type}")
    if name == "flash_attention_2" and not (bfloat16 or config.precision == "pure_bfloat16"):
        raise _refused(name, "it computes in 16 bits, and this run in float32; set precision: bfloat16")
    models = [model for model in module.modules() if isinstance(model, PreTrainedModel)]
    for model in models:
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise _refused(name, f"{type(model).__name__}: {first_line(error)}") from None
    for model in models:  # transformers only warns of a class that cannot change, or falls back to another kernel
        if model.config._attn_implementation != name:
            raise _refused(name, f"{type(model).__name__} does not offer it")
    if not models:
        raise _refused(name, f"{type(module).__name__} is not a model of transformers")


def _refused(name: str, reason: str) -> UserError:
    return UserError(f"training.attention: {name} is not available ({reason}); set it to auto, or another kernel")
