"""Normalized gates are those of a softmax over all experts, and stay right where that one's shares are too small."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from expertctl.core.models.kernels.top_k_gates import choose_before_softmax, top_k_gates


@given(st.integers(0, 2**16), st.integers(1, 6), st.booleans())
def test_gates_are_shares_of_the_softmax_over_all_experts(seed: int, top_k: int, normalized: bool) -> None:
    logits = 3 * torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gates, chosen = top_k_gates(logits.float(), top_k, normalized=normalized)
    expected, experts = logits.softmax(dim=-1).topk(top_k, dim=-1)
    if normalized:
        expected = expected / expected.sum(dim=-1, keepdim=True)
    assert chosen.equal(experts)
    torch.testing.assert_close(gates.double(), expected, atol=1e-6, rtol=1e-5)


def test_logits_far_below_the_largest_keep_their_order() -> None:
    gates, chosen = top_k_gates(torch.tensor([[-300.0, 200.0, -200.0, -250.0]]), 3, normalized=True)
    assert chosen.tolist() == [[1, 2, 3]]
    assert gates.tolist() == [[1.0, 0.0, 0.0]]


def routers() -> list[torch.nn.Module]:
    made = [
        MixtralTopKRouter(MixtralConfig(hidden_size=6, num_local_experts=4, num_experts_per_tok=2)),
        *(
            Qwen3MoeTopKRouter(
                Qwen3MoeConfig(hidden_size=6, num_experts=4, num_experts_per_tok=2, norm_topk_prob=normalized)
            )
            for normalized in (True, False)
        ),
    ]
    for router in made:
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("router", routers(), ids=["always", "normalized", "not"])
@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda router: pickle.loads(pickle.dumps(router))])
def test_a_router_decides_as_before_and_so_does_its_copy(
    router: torch.nn.Module, copied_by: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    hidden = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    before = router(hidden)
    choose_before_softmax(router)
    copied = copied_by(router)
    for decided in (router(hidden), copied(hidden)):
        torch.testing.assert_close(decided, before)
    with torch.no_grad():
        copied.weight.zero_()
    assert not copied(hidden)[0].any()
    torch.testing.assert_close(router(hidden), before)


def test_only_gates_that_sum_to_one_are_chosen_by_logits() -> None:
    for router, replaced in zip(routers(), (True, True, False), strict=True):
        choose_before_softmax(router)
        assert ("forward" in vars(router)) == replaced
