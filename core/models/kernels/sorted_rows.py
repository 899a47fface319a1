"""Tokens are put in the order of their experts, and what experts made of them back in the order of tokens.

Shapes: N = tokens, k = experts of a token, S = N k rows sorted by expert, d = width, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class SortedRows:
    """The order of rows sorted by expert, and the way back."""

    counts: list[int]
    """How many rows each of the E experts has."""
    order: Tensor
    """Which of the N k choices, token by token, a row is, (S,)."""
    token: Tensor
    """Which token a row is of, (S,)."""
    place: Tensor
    """Where a token's rows lie, (N, k)."""


def sorted_rows(chosen_Nk: Tensor, experts: int) -> SortedRows:
    """Sort tokens by the experts that were chosen for them; an expert's rows stay in the order of tokens."""
    order_S = chosen_Nk.flatten().argsort(stable=True)
    place_S = torch.empty_like(order_S)
    place_S.scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    counts: list[int] = torch.bincount(chosen_Nk.flatten(), minlength=experts).tolist()
    return SortedRows(counts, order_S, order_S // chosen_Nk.shape[1], place_S.view_as(chosen_Nk))


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
    rows = sorted_rows(chosen_Nk, experts)
    to_experts: Callable[..., Tensor] = _ToExperts.apply
    to_tokens: Callable[..., Tensor] = _ToTokens.apply
    found_Sd = run(to_experts(hidden_Nd, rows), rows.counts)
    dtype = torch.promote_types(found_Sd.dtype, gates_Nk.dtype)
    return to_tokens(found_Sd.to(dtype), gates_Nk.to(dtype), rows)


class _ToExperts(torch.autograd.Function):
    """`hidden[token]`, whose gradient is summed from known places: adding it up row by row takes several times as long."""

    @staticmethod
    def forward(ctx: Any, hidden_Nd: Tensor, rows: SortedRows) -> Tensor:
        ctx.rows = rows
        return hidden_Nd.index_select(0, rows.token)

    @staticmethod
    def backward(ctx: Any, gradient_Sd: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(gradient_Sd, ctx.rows.place), None


class _ToTokens(torch.autograd.Function):
    """The gated sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, found_Sd: Tensor, gates_Nk: Tensor, rows: SortedRows) -> Tensor:
        ctx.save_for_backward(found_Sd, gates_Nk)
        ctx.rows = rows
        return _summed(found_Sd, rows.place, gates_Nk)

    @staticmethod
    def backward(ctx: Any, gradient_Nd: Tensor) -> tuple[Tensor | None, ...]:
        found_Sd, gates_Nk = ctx.saved_tensors
        rows: SortedRows = ctx.rows
        gradient_Sd = gradient_Nd.index_select(0, rows.token)
        d_gates_Nk = None
        if ctx.needs_input_grad[1]:
            d_gates_S = (gradient_Sd * found_Sd).sum(dim=1)
            d_gates_Nk = d_gates_S.index_select(0, rows.place.flatten()).view_as(gates_Nk)
        d_found_Sd = gradient_Sd * gates_Nk.flatten().index_select(0, rows.order)[:, None]
        return d_found_Sd, d_gates_Nk, None


def _summed(x_Sd: Tensor, place_Nk: Tensor, gates_Nk: Tensor | None = None) -> Tensor:
    """Return the sum of each token's rows in one pass over them, (N, d)."""
    if not len(place_Nk):
        return x_Sd
    if torch.is_grad_enabled():  # a gradient that is to have one of its own, which the bag's has not
        rows_Nkd = x_Sd[place_Nk]
        return (rows_Nkd if gates_Nk is None else rows_Nkd * gates_Nk[..., None]).sum(dim=1)
    return embedding_bag(place_Nk, x_Sd, mode="sum", per_sample_weights=gates_Nk)
