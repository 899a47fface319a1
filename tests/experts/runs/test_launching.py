"""A launcher of a third party gets its own options, from the project file and from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import expertctl
from expertctl import Launcher, LaunchResult, Reporter, UserError, Workspace
from expertctl.core.config.settings import LauncherConfig, ProjectConfig
from expertctl.core.testing import fresh_plugins
from expertctl.experts.runs import launching


@dataclass(frozen=True, order=True)
class NodeOptions:
    partition: str = "short"
    gpus: int = 1


class Recorder:
    """A plugin whose launcher trains nothing and keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[str, ...], int, NodeOptions]] = []
        self.fitting_jobs: Callable[[Sequence[Path], NodeOptions], int] | None = None

    @expertctl.hookimpl
    def launchers(self) -> list[Launcher]:
        return [Launcher("nodes", "for a test", self.launch, NodeOptions, fitting_jobs=self.fitting_jobs)]

    def launch(self, runs: Sequence[Path], jobs: int, reporter: Reporter, options: NodeOptions) -> list[LaunchResult]:
        self.calls.append((tuple(run.name for run in runs), jobs, options))
        return [LaunchResult(run, None) for run in runs]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    plugin = Recorder()
    manager = fresh_plugins(plugin)
    monkeypatch.setattr(launching, "installed_plugins", lambda: manager)
    return plugin


def test_options_arrive_typed(recorder: Recorder, tmp_path: Path) -> None:
    config = LauncherConfig(name="nodes", options={"gpus": "4"})
    result = launching.launch([tmp_path / "law"], 2, config)
    assert recorder.calls == [(("law",), 2, NodeOptions(gpus=4))]
    assert result.finished == ("law",)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LauncherConfig(name="nodez"), "no launcher 'nodez' \\(did you mean 'nodes'\\?\\)"),
        (LauncherConfig(name="nodes", options={"gpu": 1}), "launcher 'nodes' has no option 'gpu'.*'gpus'"),
        (LauncherConfig(name="local", options={"gpus": 1}), "launcher 'local' has no option 'gpus'"),
    ],
)
def test_unknown_launchers_and_options_are_refused(recorder: Recorder, config: LauncherConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        launching.launch([], 1, config)
    assert recorder.calls == []


def test_the_project_file_names_a_launcher_alone_or_with_options() -> None:
    assert ProjectConfig.model_validate({"launcher": "nodes"}).launcher == LauncherConfig(name="nodes")
    content = {"launcher": {"name": "nodes", "options": {"gpus": 2}}}
    assert ProjectConfig.model_validate(content).launcher.options == {"gpus": 2}


def test_a_workspace_trains_with_a_launcher_and_its_options(project: Workspace, recorder: Recorder) -> None:
    project.branch("law", domain="prose", training={"tokens": 1_000})
    project.train("law", launcher=LauncherConfig(name="nodes", options={"partition": "long"}))
    assert recorder.calls == [(("law",), 1, NodeOptions("long"))]


def test_experts_have_launchers_of_their_own(project: Workspace, recorder: Recorder) -> None:
    """Options of the command line are above those of an expert, these above the project's."""
    config = json.loads(project.layout.config_file.read_text())
    config["launcher"] = {"name": "nodes", "options": {"partition": "long", "gpus": 2}}
    config["experts"] = {
        "plain": {"domain": "prose"},
        "wide": {"domain": "prose", "launcher": {"options": {"gpus": 8}}},
        "other": {"domain": "prose", "launcher": {"name": "nodes", "options": {"partition": "short"}}},
    }
    project.layout.config_file.write_text(json.dumps(config))
    Workspace(project.root).train()
    assert sorted(recorder.calls) == [
        (("other",), 1, NodeOptions("short", 2)),
        (("plain",), 1, NodeOptions("long", 2)),
        (("wide",), 1, NodeOptions("long", 8)),
    ]
    recorder.calls.clear()
    Workspace(project.root).train(jobs=3, launcher=LauncherConfig(options={"partition": "mine"}))
    assert sorted(recorder.calls) == [
        (("other", "plain"), 3, NodeOptions("mine", 2)),
        (("wide",), 3, NodeOptions("mine", 8)),
    ]
    recorder.calls.clear()
    config["experts"]["wide"]["launcher"] = "local"
    assert ProjectConfig.model_validate(config).experts["wide"].launcher == LauncherConfig(name="local")
    given = LauncherConfig(name="nodes", options={"gpus": 1})
    assert LauncherConfig(name="local", options={"nproc": 2}).overlay(given) == given


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jobs": "auto"}, "launcher 'nodes' cannot tell how many runs fit; give --jobs a number"),
        ({"detach": True}, "runs of launcher 'nodes' end with the command that starts them; leave out --detach"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused_before_anything_starts(
    project: Workspace, recorder: Recorder, settings: dict[str, Any], message: str
) -> None:
    project.branch("law", domain="prose")
    with pytest.raises(UserError, match=message):
        project.train("law", launcher="nodes", **settings)
    assert recorder.calls == []


def test_the_launcher_counts_the_runs_that_fit(project: Workspace, recorder: Recorder) -> None:
    recorder.fitting_jobs = lambda runs, options: len(runs) + options.gpus
    manager = fresh_plugins(recorder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "installed_plugins", lambda: manager)
        project.branch("law", domain="prose")
        project.train("law", jobs="auto", launcher="nodes")
    assert [jobs for _, jobs, _ in recorder.calls] == [2]


@pytest.mark.parametrize("functions", [{}, {"launch": print, "scheduler": print}])
def test_a_launcher_either_launches_or_schedules(functions: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="launcher 'x' needs either `launch` or `scheduler`"):
        Launcher("x", "for a test", **functions)


@pytest.mark.parametrize("is_raised", [True, False])
def test_an_interruption_starts_nothing_more_and_forgets_no_run(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_raised: bool
) -> None:
    """Ctrl-C may come at any moment: while a launcher prepares, or while its runs train."""

    def launch(runs: Sequence[Path], jobs: int, reporter: Reporter, options: NodeOptions) -> list[LaunchResult]:
        if options.gpus == 1:
            return [LaunchResult(run, None) for run in runs]
        if options.gpus == 2 and is_raised:
            raise KeyboardInterrupt
        assert options.gpus == 2, "the third group is not started"
        return [LaunchResult(run, None, interrupted=True) for run in runs]

    monkeypatch.setattr(recorder, "launch", launch)
    runs = [tmp_path / name for name in ("a", "b", "c", "d")]
    own = {run: LauncherConfig(name="nodes", options={"gpus": number}) for number, run in enumerate(runs[:3], 1)}
    result = launching.launch(runs, 1, LauncherConfig(name="nodes", options={"gpus": 2}), own_launchers=own)
    assert result.finished == ("a",)
    assert sorted(result.interrupted) == ["b", "c", "d"]
