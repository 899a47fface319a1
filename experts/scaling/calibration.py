"""Measuring of training steps on this machine, to which the step model is fitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...core.errors import UserError
from ...core.reporting import SILENT, Reporter
from .step_model import Measured, StepModel, Workload, fitted


@dataclass(frozen=True)
class Trial:
    """A Llama-like model and batch to measure."""

    hidden: int
    feed_forward: int
    layers: int
    vocabulary: int
    batch: int
    length: int

    @property
    def size(self) -> dict[str, Any]:
        """The size as settings of `LlamaConfig`."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": max(self.length, 2048),
        }


FITTED = (
    Trial(256, 704, 4, 4096, 2, 256),
    Trial(256, 704, 8, 4096, 4, 128),
    Trial(512, 1408, 4, 4096, 2, 256),
    Trial(512, 2048, 6, 2048, 1, 1024),
    Trial(256, 704, 6, 32768, 2, 256),
    Trial(384, 1024, 8, 8192, 8, 256),
    Trial(512, 1408, 8, 16384, 4, 256),
    Trial(768, 2048, 6, 4096, 1, 512),
    Trial(256, 1024, 6, 4096, 1, 2048),
    Trial(640, 1728, 10, 8192, 2, 128),
)
"""Shapes that determine every coefficient: deep and shallow, long and short blocks, large and small vocabularies."""


def calibrated(trials: Sequence[Trial] = FITTED, reporter: Reporter = SILENT) -> StepModel:
    """Measure steps on this machine, on one core each, and fit the model to them; takes some minutes."""
    return fitted([*measure_all(trials, reporter)])


def measure_all(trials: Sequence[Trial], reporter: Reporter = SILENT) -> list[Measured]:
    """Measure every trial in a process of its own; raises `UserError` if one fails, such as without memory."""
    from transformers import LlamaConfig

    from .shape import shape_of

    done = []
    for number, trial in enumerate(trials):
        reporter.progress("measuring steps", number, len(trials), "models")
        shape = shape_of(LlamaConfig(**trial.size, tie_word_embeddings=False))
        done.append(Measured(Workload(shape, trial.batch, trial.length), **_measure(trial)))
    reporter.progress("measuring steps", len(trials), len(trials), "models")
    return done


def _measure(trial: Trial) -> dict[str, float]:
    arguments = json.dumps({"size": trial.size, "batch": trial.batch, "length": trial.length})
    process = subprocess.run(
        [sys.executable, "-P", "-m", "expertctl.experts.scaling.measured_step", arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise UserError(f"a step of a model of width {trial.hidden} cannot be measured here: {lines[-1]}")
    measured: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return measured
