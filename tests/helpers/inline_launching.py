"""Training and measuring in the test's own process: a process of its own takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from expertctl import LaunchResult, Reporter, UserError
from expertctl.core.config.settings import LauncherConfig
from expertctl.core.manifests.run import read_run
from expertctl.core.reporting import SILENT
from expertctl.experts.federation.judging import held_out
from expertctl.experts.federation.judging.judges import Judges
from expertctl.experts.runs import launching
from expertctl.experts.training.run import train_run
from expertctl.workspace import project


def launch_inline(
    runs: Sequence[Path], jobs: object, launcher: LauncherConfig, reporter: Reporter = SILENT, **settings: object
) -> launching.TrainResult:
    """Train runs one after the other; a `UserError` fails its run alone."""
    results = [_train(run, reporter) for run in runs]
    return launching.TrainResult(
        tuple(result.run.name for result in results if result.error is None),
        {result.run.name: result.error for result in results if result.error is not None},
    )


def _train(run: Path, reporter: Reporter) -> LaunchResult:
    try:
        torch.set_num_threads(read_run(run).training.threads)  # as its own process would
        train_run(run, reporter, lambda: False)
    except UserError as error:
        return LaunchResult(run, str(error))
    return LaunchResult(run, None)


@contextmanager
def inline_launching() -> Iterator[None]:
    """Let workspaces train in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "launch", launch_inline)
        yield


def ask_inline(judges: Judges, seed: Path, folder: Path) -> dict[str, Any]:
    """Score models on public text, in place of `Judges._ask`, which asks a process."""
    return held_out.answer(judges._layout, seed, folder)
