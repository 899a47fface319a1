"""SwiGLU experts of one layer with fused weights and a custom backward pass.

For slices of a parameter, autograd computes separate gradients and then concatenates them, which copies all weights in
every step. Here each expert's gradient is written directly into its slice of one tensor.
Shapes: S = rows sorted by expert, d = width, i = inner width, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def swiglu_experts(x_Sd: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    """Return `down(silu(gate(x)) * up(x))` of each expert, (S, d); `gate_up` is (E, 2 i, d), `down` is (E, d, i)."""
    apply: Callable[..., Tensor] = _SwigluExperts.apply
    return apply(x_Sd, gate_up, down, counts)


def gated_experts(
    x_Sd: Tensor, counts: list[int], gate_up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `down(activation(gate(x)) * up(x))` as `swiglu_experts`, without gradients; may activate in place."""
    output_Sd = torch.empty_like(x_Sd)
    rows = torch.split(x_Sd, counts), torch.split(output_Sd, counts)
    workspace = _workspace(x_Sd, counts, down)
    for x, output, w_gate, w_up, w_down in zip(*rows, *_halves(gate_up), down.unbind(), strict=True):
        if len(x):
            gate, up = workspace[:, : len(x)].unbind()
            torch.mm(x, w_gate.t(), out=gate)
            torch.mm(x, w_up.t(), out=up)
            torch.mm(activation(gate).mul_(up), w_down.t(), out=output)
    return output_Sd


def _workspace(x_Sd: Tensor, counts: list[int], down: Tensor) -> Tensor:
    """Return two buffers (2, rows, i) that all experts reuse, so that they stay in the CPU cache."""
    return x_Sd.new_empty(2, max(counts, default=0), down.shape[2])


class _SwigluExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Sd: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        output_Sd = torch.empty_like(x_Sd)
        saved: list[Tensor] = []
        rows = torch.split(x_Sd, counts), torch.split(output_Sd, counts)
        workspace = _workspace(x_Sd, counts, down)
        for x, output, w_gate, w_up, w_down in zip(*rows, *_halves(gate_up), down.unbind(), strict=True):
            gate, up = torch.mm(x, w_gate.t()), torch.mm(x, w_up.t())
            activated = torch.nn.functional.silu(gate)
            torch.mm(torch.mul(activated, up, out=workspace[0, : len(x)]), w_down.t(), out=output)
            saved += (gate, up, activated)
        ctx.save_for_backward(x_Sd, gate_up, down, *saved)
        ctx.counts = counts
        return output_Sd

    @staticmethod
    def backward(ctx: Any, d_output_Sd: Tensor) -> tuple[Tensor | None, ...]:
        x_Sd, gate_up, down, *saved = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # double backward: the forward pass again, in autograd's own operations
            inputs = [tensor for tensor, needed in zip((x_Sd, gate_up, down), needs_grad, strict=True) if needed]
            experts = zip(torch.split(x_Sd, ctx.counts), *_halves(gate_up), down.unbind(), strict=True)
            silu = torch.nn.functional.silu
            outputs = [(silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T for x, w_gate, w_up, w_down in experts]
            gradients = iter(torch.autograd.grad(torch.cat(outputs), inputs, d_output_Sd, create_graph=True))
            return *(next(gradients) if needed else None for needed in needs_grad), None
        d_inputs = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip((x_Sd, gate_up, down), needs_grad, strict=True)
        ]
        d_x_Sd, d_gate_up, d_down = d_inputs
        xs, d_outputs = torch.split(x_Sd, ctx.counts), torch.split(d_output_Sd, ctx.counts)
        d_xs = None if d_x_Sd is None else torch.split(d_x_Sd, ctx.counts)
        d_halves = None if d_gate_up is None else _halves(d_gate_up)
        w_gates, w_ups = _halves(gate_up)
        workspace = _workspace(x_Sd, ctx.counts, down)
        for e, (x, d_output, w_down) in enumerate(zip(xs, d_outputs, down.unbind(), strict=True)):
            gate, up, activated = saved[3 * e : 3 * e + 3]
            d_up, d_gate = workspace[:, : len(x)].unbind()
            if d_down is not None:
                _weight_gradient(d_output, torch.mul(activated, up, out=d_up), d_down[e])
            d_inner = torch.mm(d_output, w_down, out=d_gate)
            torch.mul(activated, d_inner, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_inner.mul_(up), gate, grad_input=d_gate)
            if d_halves is not None:
                _weight_gradient(d_gate, x, d_halves[0][e])
                _weight_gradient(d_up, x, d_halves[1][e])
            if d_xs is not None:
                torch.mm(d_gate, w_gates[e], out=d_xs[e]).addmm_(d_up, w_ups[e])
        return *d_inputs, None


def _halves(gate_up: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the gate matrices and the up matrices of all experts, (i, d) each, as views."""
    gates, ups = gate_up.chunk(2, dim=1)
    return gates.unbind(), ups.unbind()


def _weight_gradient(d_output: Tensor, x: Tensor, into: Tensor) -> None:
    """Write `d_output.T @ x` into a matrix in its memory order, which avoids a temporary copy."""
    if into.stride(1) == 1:
        torch.mm(d_output.t(), x, out=into)
    else:
        torch.mm(x.t(), d_output, out=into.t())
