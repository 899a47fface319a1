"""Trackers hear of a run what happens in it; whatever they do, the run goes on as without them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from recording_trackers import calls, install_recording_trackers

from expertctl import RunTracker, TrackedRun, Tracker, UserError, hookimpl
from expertctl.core.errors import Interrupted
from expertctl.core.testing import fresh_plugins
from expertctl.core.tracking import tracking as module
from expertctl.core.tracking.tracking import check_trackers, tracking


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    install_recording_trackers(tmp_path / "site", monkeypatch)
    return TrackedRun("law", "expert", tmp_path / "law", tmp_path / "store", "abc123", {"training": {"tokens": 7}}, 4)


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.02)


def warnings(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines on standard error; nothing may be on standard output."""
    shown = capfd.readouterr()
    assert shown.out == ""
    return shown.err.splitlines()


def test_a_tracker_is_opened_hears_every_call_in_order_and_is_finished(
    run: TrackedRun, capfd: pytest.CaptureFixture[str]
) -> None:
    with tracking({"recording": {}}, run) as started:
        started.log(5, {"loss": 2.5, "learning_rate": 1e-3})
        started.log(5, {"validation_loss/law": float("inf")})
        started.roll_back(4)
        started.log(5, {"loss": 2.0})
        started.summary["digest"] = "d1"
    (opened, described, _), *rest = calls(run.store)
    assert opened == "open"
    assert described == {
        "name": "law",
        "kind": "expert",
        "folder": str(run.folder),
        "store": str(run.store / "recording"),
        "id": "abc123",
        "configuration": {"training": {"tokens": 7}},
        "first_step": 4,
    }
    assert rest == [
        ["log", 5, {"loss": 2.5, "learning_rate": 1e-3}],
        ["log", 5, {"validation_loss/law": float("inf")}],
        ["roll_back", 4],
        ["log", 5, {"loss": 2.0}],
        ["finish", "finished", {"digest": "d1"}],
    ]
    assert warnings(capfd) == []  # what the tracker prints is not shown either


def test_without_trackers_no_process_is_started(run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with tracking({}, run) as started:
        started.log(1, {"loss": 1.0})
        started.roll_back(0)
    assert not run.store.exists()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(Interrupted("stopped"), "interrupted"), (KeyboardInterrupt(), "interrupted"), (UserError("text"), "failed")],
)
def test_a_tracker_hears_how_a_run_ended_but_not_the_error(run: TrackedRun, error: BaseException, outcome: str) -> None:
    with pytest.raises(type(error)) as raised, tracking({"recording": {}}, run):
        raise error
    assert raised.value is error
    assert calls(run.store)[1:] == [["finish", outcome, {}]]


@pytest.mark.parametrize("action", ["open", "log", "finish"])
def test_a_tracker_that_fails_is_off_after_one_warning_and_others_go_on(
    run: TrackedRun, action: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with tracking({"recording": {"raises": action}, "second": {}}, run) as started:
        for step in (1, 2, 3):
            started.log(step, {"loss": 1.0})
    assert warnings(capfd) == [
        f"Warning: tracker 'recording' of expert 'law': {action} failed: ConnectionError: no route for {action}; "
        "the run goes on without it"
    ]
    assert calls(run.store)[-1][0] == action
    assert [call[0] for call in calls(run.store, "second")] == ["open", "log", "log", "log", "finish"]


def test_logs_after_a_tracker_has_ended_are_dropped(run: TrackedRun, capfd: pytest.CaptureFixture[str]) -> None:
    with tracking({"recording": {"raises": "open"}}, run) as started:
        (process,) = started._processes
        assert process._process is not None
        process._process.wait()
        started.log(1, {"loss": 1.0})
        assert not process._unsent
    assert len(warnings(capfd)) == 1


@pytest.mark.parametrize("action", ["open", "log", "finish"])
def test_a_tracker_that_hangs_is_stopped(
    run: TrackedRun, action: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FINISH_SECONDS", 1)
    with tracking({"recording": {"hangs": action}}, run) as started:
        started.log(1, {"loss": 1.0})
        begun = "log" if action == "finish" else action
        wait_for(lambda: [call for call in calls(run.store) if call[0] == begun])
    (warning,) = warnings(capfd)
    assert warning.startswith("Warning: tracker 'recording' of expert 'law': it did not finish within 1 seconds")
    with pytest.raises(ProcessLookupError):
        os.kill(calls(run.store)[0][2], 0)


def test_a_tracker_that_crashes_is_named(run: TrackedRun, capfd: pytest.CaptureFixture[str]) -> None:
    with tracking({"recording": {"aborts": "log"}}, run) as started:
        started.log(1, {"loss": 1.0})
    assert warnings(capfd) == ["Warning: tracker 'recording' of expert 'law': its process ended with status -6"]


def test_an_unknown_tracker_or_option_is_a_warning_where_the_run_trains(
    run: TrackedRun, capfd: pytest.CaptureFixture[str]
) -> None:
    with tracking({"absent": {}, "recording": {"colour": date(2026, 1, 1)}}, run):
        pass
    absent, option = sorted(warnings(capfd))
    assert "open failed: UserError: no tracker 'absent'" in absent
    assert "open failed: UserError: tracker 'recording' has no option 'colour'" in option


def test_logs_that_a_pipe_has_no_room_for_arrive_later(run: TrackedRun) -> None:
    with tracking({"recording": {}}, run) as started:
        (process,) = started._processes
        assert process._process is not None
        os.kill(process._process.pid, signal.SIGSTOP)
        for step in range(3000):  # several times a pipe's 64 KiB
            started.log(step, {"loss": 1.0, "filler": 123456789.123456789})
        assert process._unsent
        os.kill(process._process.pid, signal.SIGCONT)
    assert [call[1] for call in calls(run.store) if call[0] == "log"] == list(range(3000))
    assert calls(run.store)[-1] == ["finish", "finished", {}]


def test_signals_to_all_processes_of_a_job_leave_trackers_to_the_run(run: TrackedRun) -> None:
    with tracking({"recording": {}}, run) as started:
        wait_for(lambda: calls(run.store))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(calls(run.store)[0][2], number)
        started.log(1, {"loss": 1.0})
    assert [call[0] for call in calls(run.store)] == ["open", "log", "finish"]


KILLED = """
import os, signal, sys
from pathlib import Path
from expertctl import TrackedRun
from expertctl.core.tracking.tracking import tracking
with tracking({"recording": {}}, TrackedRun("law", "expert", Path("law"), Path(sys.argv[1]), "abc123", {})) as started:
    started.log(1, {"loss": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_tracker_outlives_a_killed_run_to_record_its_end(run: TrackedRun) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(run.store)], check=False)
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: len(calls(run.store)) == 3)
    assert calls(run.store)[1:] == [["log", 1, {"loss": 1.0}], ["finish", "failed", {}]]


# --- checks before a run ---


class Plugin:
    @hookimpl
    def trackers(self) -> list[Tracker]:
        def fail(run: TrackedRun, options: Any) -> RunTracker:
            raise AssertionError("checks open nothing")

        return [
            Tracker("plain", "", fail),
            Tracker("missing", "", fail, module="no_such_module", install="expertctl[missing]"),
            Tracker("unnamed", "", fail, module="no_such_module"),
        ]


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ({"plane": {}}, r"no tracker 'plane' \(did you mean 'plain'\?\)"),
        ({"plain": {"colour": 1}}, "tracker 'plain' has no option 'colour'"),
        ({"wandb": {"mode": "loud"}}, "tracker 'wandb': option mode: "),
        (
            {"missing": {}},
            r"'missing' needs no_such_module, which is not installed: pip install 'expertctl\[missing\]'$",
        ),
        ({"plain": {}, "unnamed": {}}, "tracker 'unnamed' needs no_such_module, which is not installed$"),
    ],
)
def test_trackers_are_checked_before_a_run(
    monkeypatch: pytest.MonkeyPatch, trackers: dict[str, Any], message: str
) -> None:
    manager = fresh_plugins(Plugin())
    monkeypatch.setattr(module, "installed_plugins", lambda: manager)
    check_trackers({"plain": {}})
    with pytest.raises(UserError, match=message):
        check_trackers(trackers)
