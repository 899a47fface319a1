"""The command of the worker process that trains a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

WORKER_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
"""Variables of the worker and of the processes that it starts: output at once, no imports from the current folder."""


def worker_command(run: Path, *arguments: str, torchrun: Sequence[str] = ()) -> list[str]:
    """Return the command that trains a run; with options of torchrun, by the processes that torchrun starts.

    torchrun itself never starts them again: with gloo, the new processes can read the old ones' addresses.
    """
    launcher = ("-m", "torch.distributed.run", "--max-restarts=0", *torchrun) if torchrun else ()
    return [sys.executable, "-P", *launcher, "-m", "expertctl.experts.training.worker", str(run), *arguments]
