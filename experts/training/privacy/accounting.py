"""What a private run may cost and has cost, by Opacus's accountants.

A history is a list of (noise multiplier, sampling rate, steps); releases before training, such as the mean of an
embedding, are steps that look at every example (rate 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ....core.artefacts.lineage import package_version
from ....core.config.settings import DpConfig, TrainingConfig
from ....core.errors import UserError

Release = tuple[float, float, int]

EPSILON_TOLERANCE = 0.01
LARGEST_NOISE = 1e6


@dataclass(frozen=True)
class Mechanism:
    """The subsampled Gaussian mechanism of one run: each step sums clipped gradients of the drawn blocks and adds noise."""

    noise_multiplier: float
    """Standard deviation of the noise, as a multiple of `clip`."""
    clip: float
    rate: float
    """Probability of each block to be drawn in a step."""
    steps: int
    before: tuple[Release, ...] = ()
    """What was released before training."""


def mechanism_for(
    dp: DpConfig, training: TrainingConfig, blocks: int, before: Sequence[Release] = ()
) -> Mechanism:
    """Return the mechanism with the least noise that keeps a run within its budget.

    Raises `UserError` for a text with too few blocks, and for a budget that no noise keeps.
    """
    expected = training.batch_size * training.accumulation
    rate = expected / blocks
    if rate > 1:
        raise UserError(
            f"a step draws {expected} blocks and the text has {blocks}; lower training.batch_size or accumulation: "
            "the smaller the share of the text in a step, the less noise is needed"
        )
    if dp.delta * blocks >= 1:
        raise UserError(
            f"delta {dp.delta:g} is not below one in {blocks} blocks, so that a whole block could be given away; "
            f"choose at most {_round_down(0.1 / blocks)}"
        )
    noise = noise_multiplier(dp, rate, training.steps, before)
    return Mechanism(noise, dp.clip, rate, training.steps, tuple(before))


def noise_multiplier(dp: DpConfig, rate: float, steps: int, before: Sequence[Release] = ()) -> float:
    """Return the least noise multiplier, to within 0.01 of epsilon, with which a run stays in its budget."""
    spent = epsilon_of(before, dp) if before else 0.0
    if spent >= dp.epsilon:
        raise UserError(
            f"what is released before training costs epsilon {spent:.3g} of {dp.epsilon:g}; raise dp.embedding_noise"
        )
    if not before:
        return _opacus_noise_multiplier(dp, rate, steps)
    low, high = 0.0, 10.0
    while (reached := epsilon_of([*before, (high, rate, steps)], dp)) > dp.epsilon:
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            raise _too_small(dp)
    while dp.epsilon - reached > EPSILON_TOLERANCE:
        middle = (low + high) / 2
        found = epsilon_of([*before, (middle, rate, steps)], dp)
        if found < dp.epsilon:
            high, reached = middle, found
        else:
            low = middle
    return high


def _opacus_noise_multiplier(dp: DpConfig, rate: float, steps: int) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _without_its_warnings():
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
        raise _too_small(dp) from None


def _too_small(dp: DpConfig) -> UserError:
    return UserError(
        f"no noise keeps epsilon {dp.epsilon:g} at delta {dp.delta:g}; raise them, or train fewer tokens"
    )


def epsilon_of(history: Sequence[Release], dp: DpConfig) -> float:
    """Return the epsilon that a history has cost at the run's delta."""
    accountant = new_accountant(dp.accountant)
    accountant.history = [tuple(release) for release in history]
    with _without_its_warnings():
        return float(accountant.get_epsilon(dp.delta))


def new_accountant(name: str) -> Any:
    """Return one of Opacus's accountants, with nothing spent."""
    from opacus.accountants import create_accountant

    return create_accountant(mechanism=name)


@contextmanager
def _without_its_warnings() -> Iterator[None]:
    """Keep quiet that the best order of a Renyi divergence is the last one tried, and that logarithms of 0 are not finite.

    The first makes the figure larger than it need be, never smaller; the second happens where a density is 0.
    """
    import numpy as np

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the (largest|smallest) alpha")
        yield


def privacy_statement(
    dp: DpConfig, mechanism: Mechanism, history: Sequence[Release], block_size: int
) -> dict[str, Any]:
    """Return what `expert.json` says of a private run."""
    spent = epsilon_of(history, dp)
    secret = dp.noise == "secret"
    return {
        "protects": f"one block of {block_size} tokens, added or removed",
        # noise that can be made again can be subtracted
        "epsilon": spent if secret else None,
        **({} if secret else {"epsilon_if_noise_were_secret": spent}),
        "delta": dp.delta,
        "accountant": dp.accountant,
        "noise": dp.noise,
        "noise_multiplier": mechanism.noise_multiplier,
        "clip": mechanism.clip,
        "sampling_rate": mechanism.rate,
        "steps": mechanism.steps,
        "history": [list(release) for release in history],
        "opacus": package_version("opacus"),
    }


def say(statement: Mapping[str, Any]) -> str:
    """Return a privacy statement as one line."""
    figures = (
        f"noise multiplier {statement['noise_multiplier']:.3f}, clip {statement['clip']:g}, "
        f"sampling rate {statement['sampling_rate']:.4g}, {statement['steps']:,} steps"
    )
    if statement["epsilon"] is None:
        would = statement["epsilon_if_noise_were_secret"]
        return f"none: the noise can be made again from the random seed (epsilon {would:.2f} if it could not; {figures})"
    return (
        f"epsilon {statement['epsilon']:.2f} at delta {statement['delta']:g} ({statement['accountant']}) for "
        f"{statement['protects']}; {figures}"
    )


def _round_down(value: float) -> str:
    """Return a number as a power of ten that is not above it: `1e-05`."""
    import math

    return f"{10.0 ** math.floor(math.log10(value)):g}"
