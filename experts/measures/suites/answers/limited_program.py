"""Run a program from standard input under limits: `python -I limited_program.py SECONDS MEMORY_BYTES FILE_BYTES`.

Ends with status `PASSED` only if the program was run to its end, so that a program that ends itself early does not pass. Imports
nothing of expertctl.
"""

from __future__ import annotations

import os
import sys

PASSED, UNLIMITED = 77, 78
"""Exit statuses: the end was reached; the limits could not be set."""


def main(seconds: int, memory: int, file_bytes: int) -> None:
    """Set the limits and run the program."""
    try:
        import resource

        for kind, limit in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, file_bytes),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, 64),
        ):
            resource.setrlimit(kind, (limit, limit))
    except (ImportError, ValueError, OverflowError, OSError):
        os._exit(UNLIMITED)
    source = sys.stdin.buffer.read().decode("utf-8")
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    os._exit(PASSED)  # not by way of threads and exit handlers of the program, which may hang


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
