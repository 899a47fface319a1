"""An author who adds an objective and an optimiser from the documentation alone, in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from installed_plugin import installed_plugin

from expertctl import Workspace

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")


def example_of(hook: str) -> str:
    """Return the example of a hook in the documentation."""
    section = PAGE.split(f"### {hook}()")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    assert found[1].count("\n") < 60
    return found[1]


def test_an_objective_and_an_optimiser_of_the_documentation_train(project: Workspace, tmp_path: Path) -> None:
    code = example_of("objectives") + "\n\n" + example_of("optimisers")
    environment = installed_plugin(tmp_path / "site", "steps", code)
    command = [sys.executable, "-m", "expertctl.cli.main"]

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [*command, *arguments], cwd=project.root, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    listed = {offer["name"] for plugin in json.loads(run("--json", "plugins"))["plugins"] for offer in plugin["offers"]}
    assert {"smoothed", "rmsprop"} <= listed
    settings = ["objective=smoothed", "objective_options={smoothing: 0.2}", "optimiser=rmsprop", "learning_rate=1e-3"]
    run("branch", "own", "--domain", "prose", *(part for setting in settings for part in ("--set", setting)))
    run("train", "own")
    shown = json.loads((project.layout.experts / "own" / "expert.json").read_text())
    assert shown["config"]["training"]["objective_options"] == {"smoothing": 0.2}
    losses = [json.loads(line) for line in (project.layout.experts / "own" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 1 for line in losses if "loss" in line), "smoothing keeps a loss above 0"
