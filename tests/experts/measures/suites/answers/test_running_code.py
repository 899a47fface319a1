"""Programs of models: what passes, and what the limits stop."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from expertctl import UserError
from expertctl.experts.measures.suites.answers import limited_program
from expertctl.experts.measures.suites.answers.running_code import CodeLimits, passes, run_programs

QUICK = CodeLimits(seconds=5, memory=256 << 20, file_bytes=1 << 16)
SLEEPY = CodeLimits(seconds=1)


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("def add(a, b):\n    return a + b\nassert add(1, 2) == 3\n", True),
        ("assert 'é' == '\\u00e9'\nprint('x' * 10_000_000)", True),
        ("assert False", False),
        ("def f(:", False),
        ("raise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("import sys\nsys.exit(0)", False),
        ("x = bytearray(1 << 30)", False),
        ("open('big', 'wb').write(b'0' * (1 << 20))", False),
        ("open('small', 'wb').write(b'0')\nimport os\nassert os.listdir() == ['small']", True),
        ("import os\nassert not os.listdir()", True),
        # the interpreter itself may add the character set of its locale
        ("import os\nassert not set(os.environ) - {'LC_CTYPE'}, os.environ", True),
        ("import sys\nassert sys.flags.isolated and sys.stdin.read() == ''", True),
        ("assert __name__ == '__main__'", True),
        ("\0", False),
        ("x = '\ud800'", True),
    ],
)
def test_a_program_passes_if_it_reaches_its_end(program: str, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the user")
    assert passes(program, QUICK) is passed


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time\ntime.sleep(60)", "import os\nos.read(0, 1)\nwhile 1: 1"]
)
def test_a_program_that_does_not_end_is_killed(program: str) -> None:
    before = time.monotonic()
    assert not passes(program, SLEEPY)
    assert time.monotonic() - before < 20


def test_what_a_program_has_started_is_killed_with_it() -> None:
    program = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)  # expertctl-left-over'])\n"
    )
    assert passes(program, QUICK)
    time.sleep(0.2)
    left = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if b"expertctl-left-over" in command and b"-c" in command.split(b"\0") and state != "Z":
            left.append(folder)
    assert left == []


def test_equal_programs_run_once_and_the_order_is_kept() -> None:
    assert run_programs(["assert 1", "assert 0", "assert 1"], QUICK) == [True, False, True]


def test_a_system_without_limits_is_refused() -> None:
    with pytest.raises(UserError, match="cannot limit the memory and time"):
        passes("assert 1", CodeLimits(memory=1 << 70))  # as if the system did not know the limit
    assert limited_program.PASSED != limited_program.UNLIMITED
