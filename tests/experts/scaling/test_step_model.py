"""The model of step time and memory: it finds the coefficients of steps that follow it, and is near real ones."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from expertctl import UserError
from expertctl.experts.scaling.calibration import FITTED, Trial, measure_all
from expertctl.experts.scaling.shape import shape_of
from expertctl.experts.scaling.step_model import MEMORY_TERMS, TIME_TERMS, Measured, StepModel, Workload, fitted


def workload(trial: Trial) -> Workload:
    return Workload(shape_of(LlamaConfig(**trial.size, tie_word_embeddings=False)), trial.batch, trial.length)


def test_coefficients_are_found_again() -> None:
    true = StepModel(
        dict(zip(TIME_TERMS, (1e-11, 2e-10, 3e-9, 2e-9, 1e-9, 1e-3), strict=True)),
        dict(zip(MEMORY_TERMS, (4e8, 15.0, 18.0, 20.0), strict=True)),
    )
    steps = [workload(trial) for trial in FITTED]
    model = fitted([Measured(step, true.step_seconds(step), true.peak_bytes(step)) for step in steps])
    assert model.seconds == pytest.approx(true.seconds, rel=1e-4)
    assert model.bytes == pytest.approx(true.bytes, rel=1e-4)
    new = workload(Trial(320, 900, 7, 5000, 3, 200))
    assert model.step_seconds(new) == pytest.approx(true.step_seconds(new), rel=1e-4)


def test_too_few_steps_do_not_determine_the_coefficients() -> None:
    step = workload(FITTED[0])
    with pytest.raises(ValueError, match="do not determine 6 coefficients"):
        fitted([Measured(step, 1.0, 1e9)] * 5)


@pytest.mark.long
@pytest.mark.slow
def test_a_step_is_measured_in_a_process_of_its_own() -> None:
    small, large = measure_all([Trial(64, 128, 1, 512, 1, 64), Trial(256, 704, 4, 4096, 4, 128)])
    assert 0 < small.seconds < large.seconds
    parameters = large.workload.shape.parameters
    assert small.bytes + 16 * parameters * 0.8 < large.bytes
    with pytest.raises(UserError, match="a step of a model of width 64 cannot be measured here"):
        measure_all([Trial(64, 128, 1, 512, 1, 0)])
