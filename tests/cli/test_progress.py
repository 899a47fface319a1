"""Progress displays, including none for short work."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from expertctl import LaunchResult
from expertctl.core.process import progress
from expertctl.core.process.progress import Bars, Display, Lines, Progress, display, duration

RUN = Path("experts/law")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_after_two_seconds_and_then_every_five() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(Lines(stream, clock), ["law"], clock) as shown:
        shown.run_started(RUN, 200)
        shown.run_progressed(RUN, {"event": "started", "step": 40, "total_steps": 200, "tokens_per_step": 100})
        for step in range(41, 81):
            clock.now += 0.25
            shown.run_progressed(RUN, {"event": "progress", "step": step, "loss": 2.5})
        clock.now += 0.1
        shown.run_finished(LaunchResult(RUN, None))
    assert stream.getvalue().splitlines() == [
        "law: 24%, 48 of 200 steps, loss 2.500, 400 tokens/s, 0:38 left",
        "law: 34%, 68 of 200 steps, loss 2.500, 400 tokens/s, 0:33 left",
    ]


@pytest.mark.parametrize("bars", [False, True])
def test_notes_of_a_run_are_shown_at_once(
    bars: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    where = Bars() if bars else Lines()
    with Progress(where, ["law"]) as shown:
        if isinstance(where, Bars):
            where._timer.join(timeout=10)
        shown.run_started(RUN, 10)
        shown.run_progressed(RUN, {"event": "started", "step": 0, "notes": ["text does not teach [its] router"]})
        shown.run_progressed(RUN, {"event": "progress", "step": 1, "loss": 2.5})
    assert capsys.readouterr().err.count("law: text does not teach [its] router") == 1


def test_work_under_two_seconds_shows_nothing() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(Lines(stream, clock), clock=clock) as shown:
        for done in range(1, 4):
            clock.now += 0.5
            shown.progress("evaluating", done, 3, "scores")
    assert stream.getvalue() == ""


def test_work_of_unknown_size_is_counted() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(Lines(stream, clock), clock=clock) as shown:
        shown.progress("law", 512, unit="documents")
        clock.now += 3
        shown.progress("law", 2048, unit="documents")
    assert stream.getvalue() == "law: 2,048 documents\n"


def test_bars_appear_after_the_silence_and_name_every_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    bars = Bars()
    with Progress(bars, ["law", "code"]) as shown:
        bars._timer.join(timeout=10)
        shown.run_started(RUN, 10)
        shown.run_progressed(RUN, {"event": "progress", "step": 5, "loss": 2.5})
    err = capsys.readouterr().err
    assert "law" in err
    assert "code" in err
    assert "5 of 10 steps" in err


def test_bars_of_short_work_never_appear(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Bars()) as shown:
        shown.progress("evaluating", 1, 3, "scores")
    assert capsys.readouterr().err == ""


def test_the_display_fits_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(display(), Bars)
    assert isinstance(display(plain=True), Lines)
    assert type(display(quiet=True)) is Display
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(display(), Lines)


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (750, "12:30"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
