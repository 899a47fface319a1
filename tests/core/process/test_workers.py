"""Worker processes: answers, errors, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from expertctl.core.errors import UserError
from expertctl.core.process.workers import Worker, with_workers


def adder(number: int) -> Callable[[object], object]:
    """Prepare a worker that adds a number, and does what some other tasks say."""

    def answer(task: object) -> object:
        if task == "mend":
            raise UserError("this can be mended", exit_status=7)
        if task == "bug":
            raise ZeroDivisionError("a bug")
        if task == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "sleep":
            time.sleep(600)
        assert isinstance(task, int)
        return task + number

    return answer


def unprepared() -> Callable[[object], object]:
    raise UserError("nothing to prepare")


def ask_each(tasks: list[list[object]]) -> list[object]:
    """Return the answers of a worker per list of tasks."""
    answers: list[object] = []
    numbers = iter(range(len(tasks)))

    def lane(worker: Worker) -> bool:
        mine = tasks[next(numbers)]
        answers.extend(worker.ask(task) for task in mine)
        return False

    with_workers(len(tasks), lambda number: Worker(f"adder {number}", adder, (10,)), lane)
    return answers


def test_every_worker_answers_its_tasks() -> None:
    assert sorted(ask_each([[1, 2, 3], [4]]), key=str) == [11, 12, 13, 14]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("mend", r"^this can be mended$"),
        ("kill", r"^adder \d was killed by signal 9 \(SIGKILL\); if memory ran out, use fewer processes$"),
    ],
)
def test_an_error_of_one_worker_ends_all(task: str, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        ask_each([["sleep"], [1, task]])
    assert error.value.exit_status == (7 if task == "mend" else 1)
    assert time.monotonic() - begin < 300, "the worker that sleeps was not waited for"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)adder 0 failed:.*in answer.*ZeroDivisionError: a bug"):
        ask_each([["bug"]])


def test_a_worker_that_cannot_be_prepared_says_why() -> None:
    with pytest.raises(UserError, match="nothing to prepare"):
        with_workers(1, lambda _: Worker("nobody", unprepared, ()), lambda worker: bool(worker.ask(1)))


def test_workers_are_not_waited_for_once_all_work_is_done() -> None:
    asked = threading.Event()

    def lane(worker: Worker) -> bool:
        if asked.is_set():
            return worker.ask(1) == 11
        asked.set()
        worker.ask("sleep")
        return False

    stopped: list[Worker] = []

    def start(number: int) -> Worker:
        stopped.append(Worker("adder", adder, (10,)))
        return stopped[-1]

    with_workers(2, start, lane)
    for worker in stopped:
        with pytest.raises(ValueError, match="closed"):
            _ = worker.pid


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_workers import adder
from expertctl.core.process.workers import Worker, with_workers

def start(number):
    worker = Worker("adder", adder, (10,))
    assert worker.ask(1) == 11
    print(worker.pid, flush=True)
    return worker

if __name__ == "__main__":
    with_workers(2, start, lambda worker: worker.ask("sleep"))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)  # the pipes are closed once the workers have ended too
    assert process.returncode in (-number, 1)
    assert "SpawnProcess" not in errors, "no worker prints a traceback"
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.05)
