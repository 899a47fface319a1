"""Experts of one layer that train while their weights lie in two tensors.

Slices of a parameter as autograd knows them have gradients of their own, which are put together at the end: a copy of
all weights in every step. Here each expert's products write into its part of one gradient. Shapes: S = rows sorted by
expert, d = width, i = inner width, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def swiglu_experts(x_Sd: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    """Return `down(silu(gate(x)) * up(x))` of each expert on its rows: gate_up (E, 2 i, d), down (E, d, i), counts (E)."""
    apply: Callable[..., Tensor] = _SwigluExperts.apply
    return apply(x_Sd, gate_up, down, counts)


class _SwigluExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Sd: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        found_Sd = torch.empty_like(x_Sd)
        kept: list[Tensor] = []
        for e, (x, found) in enumerate(
            zip(torch.split(x_Sd, counts), torch.split(found_Sd, counts), strict=True)
        ):
            to_gate, to_up = gate_up[e].chunk(2)
            gate, up = x @ to_gate.T, x @ to_up.T
            activated = torch.nn.functional.silu(gate)
            inner = activated * up
            torch.mm(inner, down[e].T, out=found)
            kept += (gate, up, activated, inner)
        ctx.save_for_backward(x_Sd, gate_up, down, *kept)
        ctx.counts = counts
        return found_Sd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_found_Sd: Tensor) -> tuple[Tensor | None, ...]:
        x_Sd, gate_up, down, *kept = ctx.saved_tensors
        wants_x, wants_gate_up, wants_down, _ = ctx.needs_input_grad
        d_x_Sd = torch.empty_like(x_Sd) if wants_x else None
        d_gate_up = torch.empty_like(gate_up) if wants_gate_up else None
        d_down = torch.empty_like(down) if wants_down else None
        begin = 0
        for e, count in enumerate(ctx.counts):
            mine = slice(begin, begin + count)
            begin += count
            gate, up, activated, inner = kept[4 * e : 4 * e + 4]
            x, d_found = x_Sd[mine], d_found_Sd[mine]
            if d_down is not None:
                _product(d_found, inner, d_down[e])
            d_inner = d_found @ down[e]
            d_up = activated * d_inner
            d_gate = torch.ops.aten.silu_backward(d_inner * up, gate)
            if d_gate_up is not None:
                for d_part, into in zip((d_gate, d_up), d_gate_up[e].chunk(2), strict=True):
                    _product(d_part, x, into)
            if d_x_Sd is not None:
                to_gate, to_up = gate_up[e].chunk(2)
                torch.mm(d_gate, to_gate, out=d_x_Sd[mine]).addmm_(d_up, to_up)
        return d_x_Sd, d_gate_up, d_down, None


def _product(left: Tensor, right: Tensor, into: Tensor) -> None:
    """Write `left.T @ right` into a matrix in the order in which it is stored; otherwise it is made elsewhere and copied."""
    if into.stride(1) == 1:
        torch.mm(left.T, right, out=into)
    else:
        torch.mm(right.T, left, out=into.T)
