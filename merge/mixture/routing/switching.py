"""Disable experts of a loaded mixture: remove their tensors from memory without changing files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def without_experts(model: PreTrainedModel, experts: Sequence[str], disabled: Collection[str]) -> PreTrainedModel:
    """Remove `disabled` experts from a loaded mixture in place and return it; raises `UserError` if none is left."""
    import torch
    from torch import nn

    from .log import routers_of

    kept = [number for number, name in enumerate(experts) if name not in disabled]
    if not kept:
        raise UserError(f"no expert is left without {', '.join(disabled)}; keep at least one")
    with torch.no_grad():
        for name, router in routers_of(model).items():
            block = model.get_submodule(name.rpartition(".")[0])
            _select_rows(router, kept)
            router.top_k = min(router.top_k, len(kept))
            if isinstance(block.experts, nn.ModuleList):
                block.experts = nn.ModuleList(block.experts[number] for number in kept)
            else:  # fused tensors with an expert axis
                _select_rows(block.experts, kept)
            if hasattr(block, "num_experts"):
                block.num_experts = len(kept)
    for key in ("num_experts", "num_local_experts"):
        if hasattr(model.config, key):
            setattr(model.config, key, len(kept))
    model.config.num_experts_per_tok = min(model.config.num_experts_per_tok, len(kept))
    return model


def _select_rows(module: Any, kept: Sequence[int]) -> None:
    """Keep some rows of a module's own parameters, whose first axis is the experts."""
    from torch import nn

    for key, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, key, nn.Parameter(parameter[list(kept)].clone(), requires_grad=False))
    module.num_experts = len(kept)
