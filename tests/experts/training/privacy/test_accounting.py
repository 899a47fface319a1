"""The account of a private run, against Opacus's own figures."""

from __future__ import annotations

import pytest
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from private_models import CONFIG, DP

from expertctl import UserError
from expertctl.core.config.settings import DpConfig
from expertctl.experts.training.privacy.accounting import (
    Mechanism,
    describe_privacy,
    epsilon_of,
    mechanism_for,
    noise_multiplier,
    privacy_statement,
)

pytestmark = pytest.mark.filterwarnings("ignore:Optimal order:UserWarning")


def test_noise_and_figure_are_opacus_own() -> None:
    mechanism = mechanism_for(DP, CONFIG, 400)
    rate = CONFIG.batch_size * CONFIG.accumulation / 400
    assert (mechanism.rate, mechanism.steps, mechanism.clip) == (rate, CONFIG.steps, 1.0)
    expected = get_noise_multiplier(
        target_epsilon=8, target_delta=1e-6, sample_rate=rate, steps=CONFIG.steps, accountant="rdp"
    )
    assert mechanism.noise_multiplier == expected

    accountant = create_accountant("rdp")
    for _ in range(CONFIG.steps):
        accountant.step(noise_multiplier=expected, sample_rate=rate)
    spent = privacy_statement(DP, mechanism, accountant.history, 16)
    assert spent.epsilon == accountant.get_epsilon(1e-6)
    assert 7.9 < spent.epsilon <= 8
    assert spent.history == ((expected, rate, CONFIG.steps),)


@pytest.mark.slow
def test_the_numerical_accountant_needs_less_noise_for_the_same_budget() -> None:
    dp = DpConfig(epsilon=8, delta=1e-6, accountant="prv")
    less = noise_multiplier(dp, 0.02, 50)
    assert less < noise_multiplier(DP, 0.02, 50)
    accountant = create_accountant("prv")
    accountant.history = [(less, 0.02, 50)]
    assert epsilon_of([(less, 0.02, 50)], dp) == accountant.get_epsilon(1e-6) <= 8


def test_releases_before_training_are_accounted_for() -> None:
    before = [(5.0, 1.0, 1)]
    with_release = noise_multiplier(DP, 0.02, 50, before)
    without = noise_multiplier(DP, 0.02, 50)
    assert with_release > without
    assert 7.9 < epsilon_of([*before, (with_release, 0.02, 50)], DP) <= 8
    # the same search with a release that costs nothing finds what Opacus finds
    assert noise_multiplier(DP, 0.02, 50, [(1e5, 1.0, 1)]) == pytest.approx(without, rel=0.01)


@pytest.mark.parametrize(
    ("dp", "blocks", "before", "message"),
    [
        (DP, 7, (), r"a step samples 8 blocks, but the text has only 7; lower training.batch_size"),
        (
            DpConfig(epsilon=8, delta=0.01),
            100,
            (),
            r"delta 0.01 is not below 1 / 100 blocks.*at most 0.001",
        ),
        (DP, 400, ((0.1, 1.0, 1),), r"before training spend epsilon .* of 8; raise dp.embedding_noise"),
        (DpConfig(epsilon=1e-9, delta=1e-12), 400, (), r"no amount of noise meets epsilon 1e-09"),
    ],
)
def test_unreachable_budgets_are_refused(
    dp: DpConfig, blocks: int, before: tuple[tuple[float, float, int], ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        mechanism_for(dp, CONFIG, blocks, before)


def test_noise_that_can_be_made_again_gives_no_epsilon() -> None:
    mechanism = Mechanism(1.0, 1.0, 0.02, 50)
    history = [(1.0, 0.02, 50)]
    seeded = privacy_statement(DpConfig(epsilon=8, delta=1e-6, noise="seeded"), mechanism, history, 16)
    secret = privacy_statement(DP, mechanism, history, 16)
    assert seeded.epsilon is None
    assert seeded.epsilon_if_noise_were_secret == secret.epsilon > 0
    assert describe_privacy(seeded).startswith("none: the noise is drawn from the random seed")
    assert describe_privacy(secret).startswith(
        f"epsilon {secret.epsilon:.2f} at delta 1e-06 (rdp) for one block of 16 tokens"
    )
