"""Privacy accounting with Opacus: calibration of the noise and the epsilon spent.

A history is a list of (noise multiplier, sampling rate, steps). Releases before training, such as the mean of an
embedding, are steps with sampling rate 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ....core.artefacts.versions import package_version
from ....core.config.settings import DpConfig, TrainingConfig
from ....core.errors import UserError
from ....core.manifests.statements import PrivacyStatement

Release = tuple[float, float, int]

EPSILON_TOLERANCE = 0.01
LARGEST_NOISE = 1e6


@dataclass(frozen=True)
class Mechanism:
    """The subsampled Gaussian mechanism of one run: noise on the sum of the sampled, clipped gradients of each step."""

    noise_multiplier: float
    """Standard deviation of the noise, as a multiple of `clip`."""
    clip: float
    """Maximum norm of a block's gradient."""
    rate: float
    """Probability of sampling each block in a step."""
    steps: int
    before: tuple[Release, ...] = ()
    """Releases before training."""


def mechanism_for(dp: DpConfig, training: TrainingConfig, blocks: int, before: Sequence[Release] = ()) -> Mechanism:
    """Return the mechanism with the least noise that keeps a run within its privacy budget.

    Raises `UserError` for a text with too few blocks, and for a budget that no noise can meet.
    """
    expected = training.batch_size * training.accumulation
    rate = expected / blocks
    if rate > 1:
        raise UserError(
            f"a step samples {expected} blocks, but the text has only {blocks}; lower training.batch_size or "
            "accumulation (a lower sampling rate also needs less noise)"
        )
    if dp.delta * blocks >= 1:
        raise UserError(
            f"delta {dp.delta:g} is not below 1 / {blocks} blocks, so it permits the release of a whole block; "
            f"use at most {10.0 ** math.floor(math.log10(0.1 / blocks)):g}"
        )
    noise = noise_multiplier(dp, rate, training.steps, before)
    return Mechanism(noise, dp.clip, rate, training.steps, tuple(before))


def noise_multiplier(dp: DpConfig, rate: float, steps: int, before: Sequence[Release] = ()) -> float:
    """Return the smallest noise multiplier that keeps a run within its budget, to within 0.01 of epsilon.

    Raises `UserError` if there is none.
    """
    spent = epsilon_of(before, dp) if before else 0.0
    if spent >= dp.epsilon:
        raise UserError(
            f"releases before training spend epsilon {spent:.3g} of {dp.epsilon:g}; raise dp.embedding_noise"
        )
    if not before:
        return _opacus_noise_multiplier(dp, rate, steps)
    low, high = 0.0, 10.0
    while (high_epsilon := epsilon_of([*before, (high, rate, steps)], dp)) > dp.epsilon:
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            raise _budget_too_small(dp)
    while dp.epsilon - high_epsilon > EPSILON_TOLERANCE:
        middle = (low + high) / 2
        middle_epsilon = epsilon_of([*before, (middle, rate, steps)], dp)
        if middle_epsilon < dp.epsilon:
            high, high_epsilon = middle, middle_epsilon
        else:
            low = middle
    return high


def _opacus_noise_multiplier(dp: DpConfig, rate: float, steps: int) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _quiet_opacus():
            return float(
                get_noise_multiplier(
                    target_epsilon=dp.epsilon,
                    target_delta=dp.delta,
                    sample_rate=rate,
                    steps=steps,
                    accountant=dp.accountant,
                    epsilon_tolerance=EPSILON_TOLERANCE,
                )
            )
    except ValueError:
        raise _budget_too_small(dp) from None


def _budget_too_small(dp: DpConfig) -> UserError:
    return UserError(
        f"no amount of noise meets epsilon {dp.epsilon:g} at delta {dp.delta:g}; raise them, or train on fewer tokens"
    )


def epsilon_of(history: Sequence[Release], dp: DpConfig) -> float:
    """Return the epsilon spent by a history at the run's delta."""
    accountant = new_accountant(dp.accountant)
    accountant.history = [tuple(release) for release in history]
    with _quiet_opacus():
        return float(accountant.get_epsilon(dp.delta))


def new_accountant(name: str) -> Any:
    """Return a new Opacus accountant with an empty history."""
    from opacus.accountants import create_accountant

    return create_accountant(mechanism=name)


@contextmanager
def _quiet_opacus() -> Iterator[None]:
    """Suppress Opacus's warnings about the range of Renyi orders and numpy's about logarithms of 0.

    A limited range of orders can only overestimate epsilon; logarithms of 0 occur where a density is 0.
    """
    import numpy as np

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the (largest|smallest) alpha")
        yield


def privacy_statement(
    dp: DpConfig, mechanism: Mechanism, history: Sequence[Release], block_size: int
) -> PrivacyStatement:
    """Return the privacy statement of a run, for `expert.json`."""
    spent = epsilon_of(history, dp)
    is_secret = dp.noise == "secret"
    return PrivacyStatement(
        protects=f"one block of {block_size} tokens, added or removed",
        # reproducible noise can be subtracted
        epsilon=spent if is_secret else None,
        epsilon_if_noise_were_secret=None if is_secret else spent,
        delta=dp.delta,
        accountant=dp.accountant,
        noise=dp.noise,
        noise_multiplier=mechanism.noise_multiplier,
        clip=mechanism.clip,
        sampling_rate=mechanism.rate,
        steps=mechanism.steps,
        history=tuple(history),
        opacus=package_version("opacus"),
    )


def describe_privacy(statement: PrivacyStatement) -> str:
    """Return a privacy statement as one line of text."""
    figures = (
        f"noise multiplier {statement.noise_multiplier:.3f}, clip {statement.clip:g}, "
        f"sampling rate {statement.sampling_rate:.4g}, {statement.steps:,} steps"
    )
    if statement.epsilon is None:
        return (
            "none: the noise is drawn from the random seed and can be subtracted "
            f"(epsilon {statement.epsilon_if_noise_were_secret:.2f} if it were secret; {figures})"
        )
    return (
        f"epsilon {statement.epsilon:.2f} at delta {statement.delta:g} ({statement.accountant}) for "
        f"{statement.protects}; {figures}"
    )
