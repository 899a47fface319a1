"""The specification of one training run: `run.json`, in the folder that becomes the artefact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from ..artefacts.digests import MANIFEST_NAMES
from ..artefacts.files import read_json, write_json
from ..config.settings import DpConfig, TrainingConfig
from .records import parse_record, record, record_as_json

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "training.log"
STATE_FOLDER = ".training"
JOB_FOLDER = ".job"
"""Hidden, as files of the artefact are not."""


@record
class RunSpec:
    """Specification of one training run: everything that a process needs to start or resume it."""

    kind: Literal["seed", "expert", "generalist"]
    """Kind of artefact that the run produces."""
    name: str
    """Name of the artefact."""
    domains: tuple[str, ...]
    """Domains to train on; training blocks are drawn from them in turn."""
    training: TrainingConfig
    """Training settings, with defaults filled in."""
    trains: str = "all"
    """Trainable parameters: a trainer, or a pattern of tensor names."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the trainer."""
    start: Mapping[str, float] = field(default_factory=lambda: {"seed": 1.0})
    """Model that training starts from: `seed`, or experts with weights that sum to 1."""
    parents: Mapping[str, str] = field(default_factory=dict)
    """Digests of the seed and of the models that training starts from, recorded when the run was set up."""
    base: str | None = None
    """Runs of `tune`: the generalist, or `seed`, that training starts from."""
    slice: tuple[int, int] | None = None
    """(i, n): train on the i-th of n random slices of all domains together (the random-split baseline)."""
    preset: str | None = None
    """Size of a seed that is pretrained from scratch."""
    family: str | None = None
    """Architecture of a seed that is pretrained from scratch."""
    tied: bool = False
    """Whether such a seed shares input and output embedding."""
    tokens: tuple[str, ...] = ()
    """Special tokens of the tokenizer of a seed that is pretrained from scratch, beside its separator."""
    owner: str | None = None
    """Owner of the training data."""
    licence: str | None = None
    """Licence of the artefact."""
    dp: DpConfig | None = None
    """Differential privacy; None: ordinary training."""

    def write(self, folder: Path) -> None:
        write_json(folder / RUN_FILE, record_as_json(self))


def read_run(folder: Path) -> RunSpec:
    """Read the specification in a run's folder; raises `UserError` if there is none or it is damaged."""
    return parse_record(RunSpec, read_json(folder / RUN_FILE), str(folder / RUN_FILE))


def is_finished(folder: Path) -> bool:
    """Return whether a run's folder has become an artefact."""
    return any((folder / name).is_file() for name in MANIFEST_NAMES.values())
