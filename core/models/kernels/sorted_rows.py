"""Dispatch of tokens to experts by sorting, and gated combination of the experts' outputs per token.

Shapes: N = tokens, k = experts per token, S = N k rows sorted by expert, d = width, E = experts.
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
    """Permutation of rows sorted by expert, and its inverse."""

    counts: list[int]
    """Number of rows of each of the E experts."""
    order: Tensor
    """Index of each row in the N k choices in token order, (S,)."""
    token: Tensor
    """Token of each row, (S,)."""
    place: Tensor
    """Row of each choice of each token, (N, k)."""


def _sort_rows(chosen_Nk: Tensor, experts: int) -> SortedRows:
    """Sort tokens by their chosen experts; the rows of each expert stay in token order."""
    order_S = chosen_Nk.flatten().argsort(stable=True)
    place_S = torch.empty_like(order_S)
    place_S.scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    counts: list[int] = torch.bincount(chosen_Nk.flatten(), minlength=experts).tolist()
    return SortedRows(counts, order_S, order_S // chosen_Nk.shape[1], place_S.view_as(chosen_Nk))


def gated_sum(
    run: Callable[[Tensor, list[int]], Tensor], experts: int, hidden_Nd: Tensor, gates_Nk: Tensor, chosen_Nk: Tensor
) -> Tensor:
    """Return each token's gated sum, (N, d); `run` maps sorted rows (S, d) and their number per expert to outputs."""
    rows = _sort_rows(chosen_Nk, experts)
    to_experts: Callable[..., Tensor] = _ToExperts.apply
    to_tokens: Callable[..., Tensor] = _ToTokens.apply
    output_Sd = run(to_experts(hidden_Nd, rows), rows.counts)
    dtype = torch.promote_types(output_Sd.dtype, gates_Nk.dtype)
    return to_tokens(output_Sd.to(dtype), gates_Nk.to(dtype), rows)


class _ToExperts(torch.autograd.Function):
    """`hidden[token]` with a gather-based backward pass, several times as fast as index_select's scatter-add."""

    @staticmethod
    def forward(ctx: Any, hidden_Nd: Tensor, rows: SortedRows) -> Tensor:
        ctx.rows = rows
        return hidden_Nd.index_select(0, rows.token)

    @staticmethod
    def backward(ctx: Any, gradient_Sd: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(gradient_Sd, ctx.rows.place), None


class _ToTokens(torch.autograd.Function):
    """Gated sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, output_Sd: Tensor, gates_Nk: Tensor, rows: SortedRows) -> Tensor:
        ctx.save_for_backward(output_Sd, gates_Nk)
        ctx.rows = rows
        return _summed(output_Sd, rows.place, gates_Nk)

    @staticmethod
    def backward(ctx: Any, gradient_Nd: Tensor) -> tuple[Tensor | None, ...]:
        output_Sd, gates_Nk = ctx.saved_tensors
        rows: SortedRows = ctx.rows
        gradient_Sd = gradient_Nd.index_select(0, rows.token)
        d_gates_Nk = None
        if ctx.needs_input_grad[1]:
            d_gates_S = (gradient_Sd * output_Sd).sum(dim=1)
            d_gates_Nk = d_gates_S.index_select(0, rows.place.flatten()).view_as(gates_Nk)
        d_output_Sd = gradient_Sd * gates_Nk.flatten().index_select(0, rows.order)[:, None]
        return d_output_Sd, d_gates_Nk, None


def _summed(x_Sd: Tensor, place_Nk: Tensor, gates_Nk: Tensor | None = None) -> Tensor:
    """Return the (gated) sum of each token's rows in one pass, (N, d)."""
    if not len(place_Nk):
        return x_Sd
    if torch.is_grad_enabled():  # double backward, which embedding_bag does not support
        rows_Nkd = x_Sd[place_Nk]
        return (rows_Nkd if gates_Nk is None else rows_Nkd * gates_Nk[..., None]).sum(dim=1)
    return embedding_bag(place_Nk, x_Sd, mode="sum", per_sample_weights=gates_Nk)
