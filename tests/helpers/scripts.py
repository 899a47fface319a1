"""Running a script of the repository, in a process of its own or in the test's."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from inline_launching import inline_launching


def run(*words: str | Path) -> str:
    """Run Python with these arguments and return what it printed; the exit status has to be 0."""
    result = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_here(script: Path, *words: str | Path) -> str:
    """Run a script and all training that it starts in this process; return what it printed."""
    with pytest.MonkeyPatch.context() as patch, inline_launching(), redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [str(script), *map(str, words)])
        patch.setattr(sys, "path", list(sys.path))
        runpy.run_path(str(script), run_name="__main__")
    return out.getvalue()
