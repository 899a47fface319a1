"""Experts of a loaded mixture switched off: their tensors leave memory, files stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def without_experts(model: PreTrainedModel, experts: Sequence[str], gone: Collection[str]) -> PreTrainedModel:
    """Return the mixture with only the experts that are not `gone`; of a top-k no more than there are.

    Raises `UserError` where none is left.
    """
    import torch
    from torch import nn

    from .log import routers_of

    kept = [number for number, name in enumerate(experts) if name not in gone]
    if not kept:
        raise UserError(f"no expert would be left without {', '.join(gone)}")
    with torch.no_grad():
        for name, router in routers_of(model).items():
            block = model.get_submodule(name.rpartition(".")[0])
            for key, parameter in list(router.named_parameters(recurse=False)):
                setattr(router, key, nn.Parameter(parameter[kept].clone(), requires_grad=False))
            router.num_experts = len(kept)
            router.top_k = min(router.top_k, len(kept))
            block.experts = _chosen(block.experts, kept)
            if hasattr(block, "num_experts"):
                block.num_experts = len(kept)
    for key in ("num_experts", "num_local_experts"):
        if hasattr(model.config, key):
            setattr(model.config, key, len(kept))
    model.config.num_experts_per_tok = min(model.config.num_experts_per_tok, len(kept))
    return model


def _chosen(experts: Any, kept: Sequence[int]) -> Any:
    """Return fewer experts: modules of a list, or rows of the tensors that hold all of them."""
    from torch import nn

    if isinstance(experts, nn.ModuleList):
        return nn.ModuleList([experts[number] for number in kept])
    for key, parameter in list(experts.named_parameters(recurse=False)):
        setattr(experts, key, nn.Parameter(parameter[list(kept)].clone(), requires_grad=False))
    experts.num_experts = len(kept)
    return experts
