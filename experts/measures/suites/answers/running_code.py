"""Programs that models write, run in processes of their own with limits. That is no security boundary."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .....core.errors import UserError
from .....core.process.compute import available_cores
from .....core.reporting import SILENT, Reporter
from . import limited_program

MOST_AT_A_TIME = 4


@dataclass(frozen=True)
class CodeLimits:
    """Limits of one program."""

    seconds: int = 10
    """Of the clock, and of each core's time."""
    memory: int = 1 << 30
    """Bytes of address space."""
    file_bytes: int = 16 << 20
    """Size of each file that it writes."""


DEFAULT_LIMITS = CodeLimits()


def passes(program: str, limits: CodeLimits = DEFAULT_LIMITS) -> bool:
    """Return whether a Python program runs to its end without an error, within its limits.

    It runs isolated (`python -I`) in an empty temporary folder, without the environment of this process, with empty input, and
    what it prints is dropped. What it has started is killed with it, unless it has left its process group. Raises `UserError`
    where the limits cannot be set.
    """
    with tempfile.TemporaryDirectory(prefix="expertctl-code-", ignore_cleanup_errors=True) as folder:
        numbers = (limits.seconds, limits.memory, limits.file_bytes)
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", limited_program.__file__, *map(str, numbers)],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(program.encode("utf-8", errors="replace"), limits.seconds)
            status = process.returncode
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == limited_program.UNLIMITED:
        raise UserError("this system cannot limit the memory and time of a process, so code is not run; use Linux")
    return status == limited_program.PASSED


def run_programs(
    programs: Sequence[str], limits: CodeLimits = DEFAULT_LIMITS, reporter: Reporter = SILENT
) -> list[bool]:
    """Return for each program whether it passes; equal ones run once, a few at a time."""
    distinct = list(dict.fromkeys(programs))
    results: dict[str, bool] = {}
    with ThreadPoolExecutor(min(available_cores(), MOST_AT_A_TIME)) as pool:
        for program, passed in zip(distinct, pool.map(lambda text: passes(text, limits), distinct), strict=True):
            results[program] = passed
            reporter.progress("running programs", len(results), len(distinct), "programs")
    return [results[program] for program in programs]
