"""Following jobs: restarts, limits, several commands, a scheduler that is silent; without processes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reporters import Recorder
from scripted_scheduler import Act, ScriptedScheduler

from expertctl.core.config.settings import LauncherConfig
from expertctl.core.errors import UserError
from expertctl.core.manifests.run import JOB_FOLDER
from expertctl.core.reporting import LaunchResult
from expertctl.experts.runs.jobs import job_queue
from expertctl.experts.runs.jobs.job_file import SubmittedJob, read_job
from expertctl.experts.runs.jobs.job_queue import JobQueue
from expertctl.experts.runs.jobs.run_job import ScheduledRun
from expertctl.experts.runs.jobs.status import require_no_job

RESTARTS = 2
ENDINGS = ("finish", "error", "save", "kill", "die early", "lose", "cancel")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_queue, "READ_SECONDS", 0.0)


def runs_in(root: Path, *names: str) -> list[Path]:
    (root / "expertctl.yaml").write_text("{}")
    for name in names:
        (root / "experts" / name).mkdir(parents=True)
    return [root / "experts" / name for name in names]


def queue_of(runs: Sequence[Path], cluster: ScriptedScheduler, jobs: int = 9) -> tuple[JobQueue, Recorder]:
    said = Recorder()
    config = LauncherConfig(name="scripted")
    return JobQueue([ScheduledRun(run, config, cluster.scheduler) for run in runs], jobs, said), said


def follow(runs: Sequence[Path], cluster: ScriptedScheduler, jobs: int = 9) -> list[LaunchResult]:
    queue, _ = queue_of(runs, cluster, jobs)
    queue.submit()
    return queue.follow()


def expected(acts: Sequence[Act]) -> tuple[int, str]:
    """Return the number of jobs and the outcome that a script has to lead to; the last act is repeated."""
    failures = 0
    for number in range(1, 1000):
        act = acts[min(number, len(acts)) - 1]
        if act.ending in ("finish", "error", "cancel"):
            return number, {"finish": "finished", "error": "failed", "cancel": "interrupted"}[act.ending]
        failures = 0 if act.is_progress else failures + 1
        if act.ending == "die early" or failures > RESTARTS:
            return number, "failed"
    raise AssertionError("this script has no end")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.builds(Act, st.sampled_from(ENDINGS), st.booleans()), max_size=8), st.sampled_from(["finish", "kill"])
)
def test_a_run_is_submitted_until_it_ends_or_gets_no_further(acts: list[Act], last: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (run,) = runs_in(Path(folder), "law")
        script = [*acts, Act(last)]
        cluster = ScriptedScheduler(*script, restarts=RESTARTS)
        (result,) = follow([run], cluster)
        outcome = "failed" if result.error else "interrupted" if result.interrupted else "finished"
        assert (len(cluster.jobs), outcome) == expected(script)
        assert (run / JOB_FOLDER).exists() == (outcome != "finished")


def test_at_most_so_many_jobs_at_a_time(tmp_path: Path) -> None:
    runs = runs_in(tmp_path, "a", "b", "c")
    cluster = ScriptedScheduler("hang")
    queue, _ = queue_of(runs, cluster, jobs=2)
    queue.submit()
    assert [result.job for result in queue.detach()] == ["1", "2"]
    assert cluster.most_live == 2


@pytest.mark.parametrize("ending", ["hang", "wait"])
def test_another_command_follows_the_same_job(tmp_path: Path, ending: str) -> None:
    runs = runs_in(tmp_path, "a")
    cluster = ScriptedScheduler(ending)
    for _ in range(2):  # a second job for the run is an assertion error of the cluster
        queue, said = queue_of(runs, cluster)
        queue.submit()
        assert [result.job for result in queue.detach()] == ["1"]
    assert said.lines[0].startswith("a: job 1 was submitted ")


def test_the_end_that_one_command_sees_is_that_of_all(tmp_path: Path) -> None:
    (run,) = runs_in(tmp_path, "a")
    cluster = ScriptedScheduler("lose", "error", "finish")
    first, second = (queue_of([run], cluster)[0] for _ in range(2))
    first.submit()
    second.submit()
    assert first.follow() == [LaunchResult(run, "as scripted")]  # it has submitted the second job
    assert second.follow() == [LaunchResult(run, "as scripted")]
    assert len(cluster.jobs) == 2
    assert follow([run], cluster) == [LaunchResult(run, None)]  # a later command tries again
    assert len(cluster.jobs) == 3


def test_a_cancelled_job_is_not_submitted_again_by_others(tmp_path: Path) -> None:
    runs = runs_in(tmp_path, "a", "b")
    cluster = ScriptedScheduler("hang")
    first, said = queue_of(runs, cluster, jobs=1)
    second, _ = queue_of(runs[:1], cluster)
    first.submit()
    second.submit()
    first.stop()
    assert [(result.run.name, result.interrupted) for result in first.follow()] == [("a", True), ("b", True)]
    assert [result.interrupted for result in second.follow()] == [True]
    assert len(cluster.jobs) == 1
    assert "cancelling 1; waiting until their state is saved" in said.lines
    cluster.acts.append(Act("finish"))
    assert follow(runs[:1], cluster) == [LaunchResult(runs[0], None)]


def test_a_job_that_ends_with_its_command_is_left_to_it(tmp_path: Path) -> None:
    """Another command knows nothing of the job, and must not take it for lost."""
    (run,) = runs_in(tmp_path, "a")
    cluster = ScriptedScheduler("hang", "finish", can_detach=False)
    first, _ = queue_of([run], cluster)
    first.submit()
    assert follow([run], cluster) == [LaunchResult(run, "another process is working on 'a'; wait for it, or stop it")]
    first.stop()
    assert [result.interrupted for result in first.follow()] == [True]
    assert follow([run], cluster) == [LaunchResult(run, None)]


def test_a_damaged_file_fails_its_run_alone(tmp_path: Path) -> None:
    damaged, intact = runs_in(tmp_path, "a", "b")
    (damaged / JOB_FOLDER).mkdir()
    (damaged / JOB_FOLDER / "job.json").write_text("{")
    first, second = follow([damaged, intact], ScriptedScheduler("finish"))
    assert "job.json is damaged" in str(first.error)
    assert str(first.error).endswith("or delete it once no job of 'a' is in the queue")
    assert second == LaunchResult(intact, None)


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        (LauncherConfig(name="local"), r"launcher 'local' has no queue of jobs here"),
        (LauncherConfig(name="gone"), r"no launcher 'gone'; installed: "),
        (LauncherConfig(name="slurm", options={"x": 1}), r"launcher 'slurm' has no option 'x'"),
    ],
)
def test_a_job_whose_queue_does_not_answer_keeps_its_run_until_the_user_knows(
    tmp_path: Path, launcher: LauncherConfig, said: str
) -> None:
    (run,) = runs_in(tmp_path, "a")
    SubmittedJob("7", launcher, "2026-01-01T00:00:00+00:00", "records-0.jsonl").write(run)
    with pytest.raises(UserError, match=rf"^job 7 of launcher '.*' may train 'a' \({said}") as refused:
        require_no_job(run)
    assert str(refused.value).endswith(f"delete {run / JOB_FOLDER / 'job.json'}")
    (run / JOB_FOLDER / "job.json").unlink()
    require_no_job(run)


def test_a_silent_scheduler_is_asked_again_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = runs_in(tmp_path, "a")
    cluster = ScriptedScheduler("lose", "finish")
    queue, said = queue_of([run], cluster)
    queue.submit()
    cluster.is_silent = True
    waits = count()

    def sleep(seconds: float) -> None:
        cluster.is_silent = next(waits) < 4

    monkeypatch.setattr(job_queue.time, "sleep", sleep)
    assert queue.follow() == [LaunchResult(run, None)]

    cluster = ScriptedScheduler("hang")
    (run,) = runs_in(tmp_path, "b")
    queue, said = queue_of([run], cluster)
    queue.submit()
    cluster.is_silent = True
    monkeypatch.setattr(job_queue, "STATES_PATIENCE_S", 0.0)
    monkeypatch.setattr(job_queue.time, "sleep", time_passes())
    (result,) = queue.follow()
    assert result.interrupted
    assert said.lines == ["b: the scheduler does not answer; its job goes on, follow it with the same command"]
    job = read_job(run)
    assert job is not None
    assert job.outcome is None


def time_passes() -> Callable[[float], None]:
    real = time.sleep
    return lambda seconds: real(0.001)


def test_a_job_that_died_while_nobody_looked_is_submitted_again(tmp_path: Path) -> None:
    (run,) = runs_in(tmp_path, "a")
    cluster = ScriptedScheduler("hang", "finish")
    queue, _ = queue_of([run], cluster)
    queue.submit()
    queue.detach()
    cluster.cancelled.add("1")  # ended without an outcome
    assert follow([run], cluster) == [LaunchResult(run, None)]
    assert len(cluster.jobs) == 2


def test_warnings_and_the_last_words_of_a_job_arrive(tmp_path: Path) -> None:
    runs = runs_in(tmp_path, "a", "b")
    cluster = ScriptedScheduler("die early")
    queue, said = queue_of(runs, cluster)
    queue.submit()
    errors = [result.error for result in queue.follow()]
    assert errors == [
        f"its job {number} ended (said so) before training began: last words (full output in {run / 'training.log'})"
        for number, run in enumerate(runs, start=1)
    ]
    assert said.lines.count("Warning: as scripted") == 1
