"""Gradients of experts in two tensors are those of finite differences and of plain autograd."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from expertctl.core.models.kernels.sorted_rows import gated_sum
from expertctl.core.models.kernels.swiglu_experts import swiglu_experts

COUNTS = [3, 0, 2]


def numbers(*shape: int, turned: bool = False) -> Tensor:
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))
    if turned:
        tensor = tensor.mT.contiguous().mT
    return tensor.requires_grad_()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("trained", [(0, 1, 2), (1,), (2,), (1, 2)])
def test_finite_differences(trained: Sequence[int], turned: bool) -> None:
    given = [numbers(5, 4), numbers(3, 12, 4, turned=turned), numbers(3, 4, 6, turned=turned)]
    for place, tensor in enumerate(given):
        tensor.requires_grad_(place in trained)

    def function(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return swiglu_experts(x, COUNTS, gate_up, down)

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_an_expert_without_rows_gets_a_gradient_of_zero_stored_as_its_weight_is() -> None:
    x, gate_up, down = numbers(5, 4), numbers(3, 12, 4, turned=True), numbers(3, 4, 6)
    swiglu_experts(x, COUNTS, gate_up, down).sum().backward()
    for weight in (gate_up, down):
        assert weight.grad is not None
        assert weight.grad.stride() == weight.stride()
        assert not weight.grad[1].any()
        assert weight.grad[0].any()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_rows_return_to_their_tokens(top_k: int) -> None:
    hidden, gates = numbers(7, 4), numbers(7, top_k)
    chosen = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)).topk(top_k).indices
    factors = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)

    def run(rows: Tensor, counts: list[int]) -> Tensor:
        return rows * factors.repeat_interleave(torch.tensor(counts))[:, None]

    def function(hidden: Tensor, gates: Tensor) -> Tensor:
        return gated_sum(run, 3, hidden, gates, chosen)

    expected = (hidden[:, None] * (factors[chosen] * gates)[..., None]).sum(dim=1)
    torch.testing.assert_close(function(hidden, gates), expected)
    assert torch.autograd.gradcheck(function, (hidden, gates))
    assert torch.autograd.gradgradcheck(function, (hidden, gates))
