"""Top-k gating of tokens to experts. Shapes: N = tokens, E = experts, k = experts per token."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn


def top_k_gates(logits_NE: Tensor, top_k: int, *, normalized: bool) -> tuple[Tensor, Tensor]:
    """Return the gates (float32) and expert indices of the k largest logits, both (N, k), largest first.

    Gates are probabilities of the softmax over all experts. Normalised gates sum to 1 and equal the softmax over the k
    logits alone. That reads k numbers instead of E, and still distinguishes experts whose probabilities over all
    experts underflow float32.
    """
    if normalized:
        logits_Nk, chosen_Nk = logits_NE.topk(top_k, dim=-1)
        return logits_Nk.float().softmax(dim=-1), chosen_Nk
    gates_Nk, chosen_Nk = logits_NE.float().softmax(dim=-1).topk(top_k, dim=-1)
    return gates_Nk, chosen_Nk


def choose_before_softmax(router: nn.Module) -> None:
    """Make a router with normalised gates, no other, select experts by logits: 2 to 4 % faster (`docs/log.md`)."""
    if type(router).__name__ in (_ALWAYS_NORMALIZES, *_MAY_NORMALIZE) and gates_sum_to_one(router):
        router.forward = partial(_choose_and_normalize, router)


def gates_sum_to_one(router: nn.Module) -> bool:
    """Return whether a router's gates sum to 1; with one expert per token its gate is then always 1."""
    if type(router).__name__ == _ALWAYS_NORMALIZES:
        return True
    return bool(getattr(router, "norm_topk_prob", getattr(router, "normalized", False)))


_ALWAYS_NORMALIZES = "MixtralTopKRouter"
_MAY_NORMALIZE = ("FlexOlmoTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")


def _choose_and_normalize(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits_NE = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
    gates_Nk, chosen_Nk = top_k_gates(logits_NE, router.top_k, normalized=True)
    return logits_NE, gates_Nk, chosen_Nk
