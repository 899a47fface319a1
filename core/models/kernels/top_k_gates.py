"""Which k experts a token goes to, and how much of each. Shapes: N = tokens, E = experts, k = experts of a token."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn


def top_k_gates(logits_NE: Tensor, top_k: int, *, normalized: bool) -> tuple[Tensor, Tensor]:
    """Return the gates of the k largest logits, in float32, and their experts, both (N, k) and the largest first.

    Gates are shares of the softmax over all experts; normalized, they sum to one, which makes them the softmax of the k
    logits alone. That reads k numbers instead of E, and still tells experts apart whose shares are both below float32's
    smallest number.
    """
    if normalized:
        logits_Nk, chosen_Nk = logits_NE.topk(top_k, dim=-1)
        return logits_Nk.float().softmax(dim=-1), chosen_Nk
    gates_Nk, chosen_Nk = logits_NE.float().softmax(dim=-1).topk(top_k, dim=-1)
    return gates_Nk, chosen_Nk


def choose_before_softmax(router: nn.Module) -> None:
    """Let a router of transformers whose gates sum to one choose by logits; others stay as they are.

    It saves 2 to 4 hundredths of a narrow layer's time (`docs/log.md`).
    """
    if type(router).__name__ in (_ALWAYS_NORMALIZES, *_MAY_NORMALIZE) and gates_sum_to_one(router):
        router.forward = partial(_choose_and_normalize, router)


def gates_sum_to_one(router: nn.Module) -> bool:
    """Tell whether a router's gates sum to one; the gate of a single expert is then 1, whatever its logit."""
    if type(router).__name__ == _ALWAYS_NORMALIZES:
        return True
    return bool(getattr(router, "norm_topk_prob", getattr(router, "normalized", False)))


_ALWAYS_NORMALIZES = "MixtralTopKRouter"
_MAY_NORMALIZE = ("FlexOlmoTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")


def _choose_and_normalize(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits_NE = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
    gates_Nk, chosen_Nk = top_k_gates(logits_NE, router.top_k, normalized=True)
    return logits_NE, gates_Nk, chosen_Nk
