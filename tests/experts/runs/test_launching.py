"""A launcher of a third party gets its own options, from the project file and from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import expertctl
from expertctl import Launcher, LaunchResult, Reporter, UserError, Workspace
from expertctl.core.config.settings import LauncherConfig, ProjectConfig
from expertctl.core.testing import fresh_plugins
from expertctl.experts.runs import launching


@dataclass(frozen=True)
class NodeOptions:
    partition: str = "short"
    gpus: int = 1


class Recorder:
    """A plugin whose launcher trains nothing and keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[str, ...], int, NodeOptions]] = []

    @expertctl.hookimpl
    def launchers(self) -> list[Launcher]:
        return [Launcher("nodes", "for a test", self.launch, NodeOptions)]

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
