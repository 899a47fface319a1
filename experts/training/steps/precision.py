"""The device of a run and the precision of its weights and passes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ....core.config.settings import TrainingConfig
from ....core.errors import UserError
from ....core.hooks.training import TrainablePart


def resolve_device(setting: str) -> Any:
    """Return the torch device for a setting; `auto` selects a GPU if there is one.

    Raises `UserError` for an unknown device, and for a GPU where torch finds none.
    """
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(setting)
    except RuntimeError:
        raise UserError(f"unknown device '{setting}'; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{setting}' is not available: torch finds no GPU; use device: auto or cpu")
    return device


def uses_bfloat16(config: TrainingConfig, device: Any) -> bool:
    """Return whether the precision setting amounts to passes in bfloat16 on a device, with weights in float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bfloat16" or (config.precision == "auto" and native)


def autocast(config: TrainingConfig, device: Any) -> Any:
    """Return a factory of the autocast context for the precision setting on a device."""
    if uses_bfloat16(config, device):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext


@torch.no_grad()
def store_weights(
    part: TrainablePart, config: TrainingConfig, device: Any, dtypes: Mapping[str, str] | None = None
) -> None:
    """Change the weights to the dtype that they are trained in; buffers stay as they are.

    In bfloat16 passes, frozen matrices of linear layers are kept in bfloat16 if they lose nothing: results are the same. Of
    a model without weights, that is known by the `dtypes` in its files.
    """
    if config.precision == "pure_bfloat16":
        for parameter in part.module.parameters():
            if not (part.keeps_float32 and parameter.requires_grad):
                parameter.data = parameter.data.bfloat16()
    elif uses_bfloat16(config, device):
        for name, module in part.module.named_modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                small = module.weight.data.bfloat16()
                if module.weight.is_meta:
                    is_same = (dtypes or {}).get(f"{name}.weight") == "BF16"
                else:
                    is_same = torch.equal(small.to(module.weight.dtype), module.weight.data)
                if is_same:
                    module.weight.data = small
