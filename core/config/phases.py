"""Parts of a run that differ from the rest: stages of shorter blocks at its start, annealing at its end."""

from __future__ import annotations

from ..errors import UserError
from .settings import Annealing, TrainingConfig


def require_phases(training: TrainingConfig) -> None:
    """Raise `UserError` for stages and annealing that the settings of a run do not allow."""
    for _, length in training.lengths[:-1]:
        if training.sequence_length % length or length == training.sequence_length:
            raise UserError(
                f"training.stages: blocks of {training.sequence_length} tokens (sequence_length) cannot be cut into blocks of "
                f"{length}; choose a length that divides {training.sequence_length}"
            )
    for steps, length in training.lengths:
        if not steps:
            raise _no_step("training.stages", f"the part with blocks of {length} tokens", training.steps)
    if training.annealing is not None:
        _require_annealing(training, training.annealing)


def _require_annealing(training: TrainingConfig, annealing: Annealing) -> None:
    if not 0 < training.annealing_begin < training.steps:
        part = "annealing" if training.annealing_begin else "the part before it"
        raise _no_step("training.annealing", part, training.steps)
    blocks = (training.steps - training.annealing_begin) * training.batch_size * training.accumulation
    total = sum(annealing.domains.values())
    for name, weight in annealing.domains.items():
        if weight / total * blocks < 1 or weight / total < 1e-3:
            raise UserError(
                f"training.annealing: '{name}' has {weight / total:.2g} of {blocks:,} blocks, which is too little to draw one evenly; "
                "raise its weight or the share, or leave it out"
            )
    if training.schedule == "wsd" and "decay" in training.model_fields_set and training.decay != annealing.share:
        raise UserError(
            f"training.decay is {training.decay:g} and annealing.share {annealing.share:g}, but wsd decays while the run anneals; "
            "leave decay out"
        )


def _no_step(setting: str, part: str, steps: int) -> UserError:
    return UserError(
        f"{setting}: the run has {steps} steps, and {part} rounds to none; change the share, or raise tokens"
    )
