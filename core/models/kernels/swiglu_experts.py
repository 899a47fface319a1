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


def gated_experts(
    x_Sd: Tensor,
    counts: list[int],
    gate_up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return `down(activation(gate(x)) * up(x))`, as above, where nothing asks for gradients; activation may work in place."""
    found_Sd = torch.empty_like(x_Sd)
    shares = torch.split(x_Sd, counts), torch.split(found_Sd, counts)
    room = _Room(x_Sd, counts, down)
    for x, found, to_gate, to_up, to_found in zip(*shares, *_halves(gate_up), down.unbind(), strict=True):
        if len(x):
            gate, up = room.of(len(x))
            torch.mm(x, to_gate.t(), out=gate)
            torch.mm(x, to_up.t(), out=up)
            torch.mm(activation(gate).mul_(up), to_found.t(), out=found)
    return found_Sd


def _plainly(x_Sd: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    shares = zip(torch.split(x_Sd, counts), *_halves(gate_up), down.unbind(), strict=True)
    return torch.cat(
        [
            (torch.nn.functional.silu(x @ to_gate.T) * (x @ to_up.T)) @ to_found.T
            for x, to_gate, to_up, to_found in shares
        ]
    )


class _Room:
    """Two matrices (rows, i) in which expert after expert computes: the processor's cache still has them."""

    def __init__(self, x_Sd: Tensor, counts: list[int], down: Tensor) -> None:
        self._both = x_Sd.new_empty(2, max(counts, default=0), down.shape[2])

    def of(self, rows: int) -> tuple[Tensor, Tensor]:
        first, second = self._both[:, :rows].unbind()
        return first, second


class _SwigluExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Sd: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        found_Sd = torch.empty_like(x_Sd)
        kept: list[Tensor] = []
        shares = torch.split(x_Sd, counts), torch.split(found_Sd, counts)
        room = _Room(x_Sd, counts, down)
        for x, found, to_gate, to_up, to_found in zip(*shares, *_halves(gate_up), down.unbind(), strict=True):
            gate, up = torch.mm(x, to_gate.t()), torch.mm(x, to_up.t())
            activated = torch.nn.functional.silu(gate)
            inner, _ = room.of(len(x))
            torch.mm(torch.mul(activated, up, out=inner), to_found.t(), out=found)
            kept += (gate, up, activated)
        ctx.save_for_backward(x_Sd, gate_up, down, *kept)
        ctx.counts = counts
        return found_Sd

    @staticmethod
    def backward(ctx: Any, d_found_Sd: Tensor) -> tuple[Tensor | None, ...]:
        x_Sd, gate_up, down, *kept = ctx.saved_tensors
        if (
            torch.is_grad_enabled()
        ):  # gradients that are to have gradients of their own: by autograd's own ways
            wanted = [
                one for one, wants in zip((x_Sd, gate_up, down), ctx.needs_input_grad, strict=False) if wants
            ]
            found_Sd = _plainly(x_Sd, ctx.counts, gate_up, down)
            found = iter(torch.autograd.grad(found_Sd, wanted, d_found_Sd, create_graph=True))
            return *(next(found) if wants else None for wants in ctx.needs_input_grad[:3]), None
        made = [
            torch.empty_like(one) if wanted else None
            for one, wanted in zip((x_Sd, gate_up, down), ctx.needs_input_grad, strict=False)
        ]
        into_x, into_gate_up, into_down = made
        xs, d_founds = torch.split(x_Sd, ctx.counts), torch.split(d_found_Sd, ctx.counts)
        d_xs = None if into_x is None else torch.split(into_x, ctx.counts)
        d_halves = None if into_gate_up is None else _halves(into_gate_up)
        to_gates, to_ups = _halves(gate_up)
        room = _Room(x_Sd, ctx.counts, down)
        for e, (x, d_found, to_found) in enumerate(zip(xs, d_founds, down.unbind(), strict=True)):
            gate, up, activated = kept[3 * e : 3 * e + 3]
            d_up, d_gate = room.of(len(x))
            if into_down is not None:
                _weight_gradient(d_found, torch.mul(activated, up, out=d_up), into_down[e])
            d_inner = torch.mm(d_found, to_found, out=d_gate)
            torch.mul(activated, d_inner, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_inner.mul_(up), gate, grad_input=d_gate)
            if d_halves is not None:
                _weight_gradient(d_gate, x, d_halves[0][e])
                _weight_gradient(d_up, x, d_halves[1][e])
            if d_xs is not None:
                torch.mm(d_gate, to_gates[e], out=d_xs[e]).addmm_(d_up, to_ups[e])
        return *made, None


def _halves(gate_up: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return each expert's two matrices (i, d) as views: all that lead to gates, all that lead to ups."""
    gates, ups = gate_up.chunk(2, dim=1)
    return gates.unbind(), ups.unbind()


def _weight_gradient(d_output: Tensor, x: Tensor, into: Tensor) -> None:
    """Write `d_output.T @ x` into a matrix in the order in which it is stored; otherwise it is made elsewhere and copied."""
    if into.stride(1) == 1:
        torch.mm(d_output.t(), x, out=into)
    else:
        torch.mm(x.t(), d_output, out=into.t())
