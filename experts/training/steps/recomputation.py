"""Activation checkpointing: activations of a layer are computed again in the backward pass instead of kept."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from ....core.errors import UserError


def recompute_activations(module: nn.Module, *, required: bool) -> None:
    """Let every layer keep only its input for the backward pass.

    Of a model that cannot, raises `UserError` if that is `required`, and leaves the model as it is otherwise.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers and required:
        raise UserError(
            f"training.activation_checkpointing: the layers of {type(module).__name__} cannot be computed again; set it to "
            "false"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
