"""The domain posterior against Bayes' rule written out with plain numbers.

Shapes: K = experts, B = batch, T = predicted tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertctl.core.models.kernels.posterior import (
    EWMA_RATE,
    PosteriorKind,
    cached_prior,
    evidence,
    log_posterior,
    mean_posterior,
    top_mask,
)

KINDS = ("prefix", "last_token")


def naive_posterior(scores: list[list[float]], prior: list[float], kind: str) -> list[list[float]]:
    """p(D = k | x_<t) of one text, [t][k], from scores[k][t] = log p_k(x_t | x_<t)."""
    rows = []
    for t in range(len(scores[0])):
        joint = []
        for k, share in enumerate(prior):
            heard = scores[k][:t] if kind == "prefix" else scores[k][max(t - 1, 0) : t]
            joint.append(share * math.exp(math.fsum(heard)))
        rows.append([value / math.fsum(joint) for value in joint])
    return rows


def mixture_log_probs(scores_KBT: torch.Tensor, log_prior_K: torch.Tensor, kind: PosteriorKind) -> torch.Tensor:
    """Log p(x_t | x_<t) under the mixture for every token, (B, T)."""
    return (log_posterior(scores_KBT, log_prior_K, kind) + scores_KBT).logsumexp(dim=0)


def random_scores(num_experts: int, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return -3 * torch.rand(num_experts, batch, tokens, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_is_bayes_rule(kind: str) -> None:
    scores, prior = random_scores(3, 2, 7), [0.5, 0.2, 0.3]
    posterior = log_posterior(scores, torch.tensor(prior).log(), kind).exp()
    for b in range(2):
        expected = naive_posterior(scores[:, b].double().tolist(), prior, kind)
        torch.testing.assert_close(posterior[:, b].T.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mixture_is_the_sum_over_experts(kind: str) -> None:
    scores, prior = random_scores(3, 1, 5), [0.1, 0.6, 0.3]
    weights = naive_posterior(scores[:, 0].double().tolist(), prior, kind)
    expected = [
        math.log(math.fsum(weights[t][k] * math.exp(float(scores[k, 0, t])) for k in range(3))) for t in range(5)
    ]
    mixed = mixture_log_probs(scores, torch.tensor(prior).log(), kind)[0]
    torch.testing.assert_close(mixed.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


def test_the_first_token_has_no_evidence_and_the_second_has_the_first() -> None:
    scores = torch.tensor([[[-1.0, -2.0, -4.0]]])
    assert evidence(scores, "prefix").flatten().tolist() == [0, -1, -3]
    assert evidence(scores, "last_token").flatten().tolist() == [0, -1, -2]


def test_an_expert_whose_prior_is_zero_never_counts() -> None:
    scores = random_scores(2, 1, 6)
    posterior = log_posterior(scores, torch.tensor([1.0, 0.0]).log(), "prefix").exp()
    assert posterior[1].max() == 0
    torch.testing.assert_close(mixture_log_probs(scores, torch.tensor([1.0, 0.0]).log(), "prefix"), scores[0])


def test_long_texts_do_not_underflow() -> None:
    scores = torch.full((2, 1, 5000), -5.0)
    scores[1] -= 0.001
    posterior = log_posterior(scores, torch.tensor([0.5, 0.5]).log(), "prefix").exp()
    assert torch.isfinite(posterior).all()
    assert posterior[0, 0, -1] == pytest.approx(1 / (1 + math.exp(-0.001 * 4999)), abs=1e-2)


sizes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 8), st.integers(0, 1000))


@given(sizes, st.sampled_from(KINDS))
def test_weights_sum_to_one(size: tuple[int, int, int, int], kind: str) -> None:
    scores = random_scores(*size)
    prior = torch.rand(size[0], generator=torch.Generator().manual_seed(1)) + 0.01
    weights = log_posterior(scores, (prior / prior.sum()).log(), kind).exp().sum(dim=0)
    torch.testing.assert_close(weights, torch.ones_like(weights))
    assert (mixture_log_probs(scores, (prior / prior.sum()).log(), kind) <= 1e-6).all()


@given(sizes, st.sampled_from(KINDS), st.randoms())
def test_experts_in_another_order_are_weighed_the_same(
    size: tuple[int, int, int, int], kind: str, source: object
) -> None:
    scores = random_scores(*size)
    log_prior = torch.rand(size[0], generator=torch.Generator().manual_seed(2)).log_softmax(0)
    order = list(range(size[0]))
    source.shuffle(order)
    turned = log_posterior(scores[order], log_prior[order], kind)
    torch.testing.assert_close(turned, log_posterior(scores, log_prior, kind)[order], rtol=1e-4, atol=1e-5)


# --- priors ---


def test_the_mean_posterior_counts_every_token_of_every_text() -> None:
    scores, prior = random_scores(2, 3, 4), [0.5, 0.5]
    rows = [row for b in range(3) for row in naive_posterior(scores[:, b].tolist(), prior, "prefix")]
    expected = [math.fsum(row[k] for row in rows) / len(rows) for k in range(2)]
    posterior = mean_posterior(scores, torch.tensor(prior).log(), "prefix")
    torch.testing.assert_close(posterior, torch.tensor(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_the_cached_prior_is_an_exponentially_weighted_mean_of_last_posteriors(kind: str) -> None:
    """As `ewm(alpha=0.3, adjust=False)` of the posterior at each block's last position: it starts with the first one."""
    blocks = [random_scores(3, 1, 5 + i, seed=i)[:, 0] for i in range(4)]
    prior = [1 / 3] * 3
    for number, scores in enumerate(blocks):
        last = naive_posterior(scores.tolist(), prior, kind)[-1]
        prior = last if number == 0 else [0.3 * new + 0.7 * old for new, old in zip(last, prior, strict=True)]
    fitted = cached_prior(blocks, 3, kind)
    torch.testing.assert_close(fitted, torch.tensor(prior), rtol=1e-4, atol=1e-5)
    assert fitted.sum() == pytest.approx(1, abs=1e-5)
    assert EWMA_RATE == 0.3


def test_without_text_the_prior_stays_uniform() -> None:
    assert cached_prior([], 4, "prefix").tolist() == [0.25] * 4


def test_an_expert_that_explains_later_text_comes_back() -> None:
    """A first text that rules an expert out for good would leave it a prior of 0, which no evidence can raise."""
    first, later = (
        torch.tensor([[-0.1], [-30.0]]).repeat(1, 40).flip(0 if flipped else ()) for flipped in (False, True)
    )
    prior = cached_prior([first, *[later] * 12], 2, "prefix")
    assert prior[1] > 0.9


def test_top_mask_marks_the_largest_and_gives_ties_to_the_earlier() -> None:
    scores = torch.tensor([[0.1, 0.3], [0.4, 0.1], [0.4, 0.2]])[:, None]
    assert top_mask(scores, 1)[:, 0].tolist() == [[False, True], [True, False], [False, False]]
    assert top_mask(scores, 2)[:, 0].tolist() == [[False, True], [True, False], [True, True]]


# --- the scores it is made of ---


def test_token_log_probs_are_the_models_own_per_token(model_folder: object) -> None:
    from expertctl.core.models.loading import load_model
    from expertctl.core.models.scoring import token_log_probs

    model, _ = load_model(model_folder)
    tokens = torch.tensor([[5, 9, 200, 31], [7, 7, 7, 7]])
    with torch.no_grad():
        scores = token_log_probs(model, tokens)
        whole = model(input_ids=tokens).logits.double().log_softmax(-1)
    assert scores.dtype == torch.float32
    for b in range(2):
        for t in range(1, 4):
            assert float(scores[b, t - 1]) == pytest.approx(float(whole[b, t - 1, tokens[b, t]]), abs=1e-5)
