"""What surrounds lm-eval while it works: no network unless it is allowed, and nothing printed."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec

from .....core.errors import UserError
from .....core.remote.hub_access import hub_allowed

NO_PROCESSES = "DISABLE_MULTIPROC"
"""Variable of lm-eval: it would start a process per core for standard errors by resampling."""


def require_harness() -> None:
    """Raise `UserError` if lm-eval or what its model class needs is not installed."""
    if any(find_spec(name) is None for name in ("lm_eval", "accelerate", "peft")):
        raise UserError('tasks of lm-eval need the package; install it with: pip install "expertctl[lm-eval]"')


@contextmanager
def surrounded(*, download: bool) -> Iterator[None]:
    """Let lm-eval work within the block: silent, in one process, and offline unless `download`.

    What it prints would mix with the output of the command. Raises `UserError` for `download` if the user set
    `HF_HUB_OFFLINE`.
    """
    import datasets
    from huggingface_hub import constants

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    before = [logger.level for logger in loggers], constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    processes = os.environ.get(NO_PROCESSES)
    bars = datasets.is_progress_bar_enabled()
    with ExitStack() as stack:
        if download:
            stack.enter_context(hub_allowed())
        else:
            constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = not download
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            os.environ[NO_PROCESSES] = "1"
            datasets.disable_progress_bars()
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield
        finally:
            for logger, level in zip(loggers, before[0], strict=True):
                logger.setLevel(level)
            _, constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
            if processes is None:
                os.environ.pop(NO_PROCESSES, None)
            if bars:
                datasets.enable_progress_bars()
