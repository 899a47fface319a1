"""Running a script of the repository in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(*words: str | Path) -> str:
    """Run Python with these arguments and return what it printed; the exit status has to be 0."""
    result = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout
