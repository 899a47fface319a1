"""Tokens are put in the order of their experts, and what experts made of them back in the order of tokens.

Shapes: N = tokens, k = experts of a token, S = N k rows sorted by expert, d = width, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def gated_sum(
    run: Callable[[Tensor, list[int]], Tensor],
    experts: int,
    hidden_Nd: Tensor,
    gates_Nk: Tensor,
    chosen_Nk: Tensor,
) -> Tensor:
    """Return the gated sum of what `run` makes of each token for each of its experts, (N, d).

    `run` is given rows (S, d) sorted by expert, and how many of them each of the E experts has.
    """
    order_S = chosen_Nk.flatten().argsort(stable=True)
    counts = torch.bincount(chosen_Nk.flatten(), minlength=experts).tolist()
    place_S = torch.empty_like(order_S).scatter_(
        0, order_S, torch.arange(len(order_S), device=order_S.device)
    )
    top_k = chosen_Nk.shape[1]
    rows: Callable[..., Tensor] = _Rows.apply
    found_Sd = run(rows(hidden_Nd, order_S // top_k, place_S, top_k), counts)
    found_Nkd = rows(found_Sd, place_S, order_S, 1).view(*chosen_Nk.shape, hidden_Nd.shape[1])
    gated_Nkd: Tensor = found_Nkd * gates_Nk[..., None]
    return gated_Nkd.squeeze(1) if top_k == 1 else gated_Nkd.sum(dim=1)


class _Rows(torch.autograd.Function):
    """`x[index]`, whose gradient is read from known places: adding it up row by row takes several times as long.

    `back` says where the gradients of x's rows lie, `times` of them one after the other for each row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.shape = (len(x), times)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        found = gradient.index_select(0, back)
        if ctx.shape[1] > 1:
            found = found.view(*ctx.shape, found.shape[1]).sum(dim=1)
        return found, None, None, None
