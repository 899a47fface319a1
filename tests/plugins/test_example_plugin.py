"""The example plugin as a third party would use it: installed with pip, found by a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from expertctl.core.hooks.merging import MergeMethod

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin_trimmed_mean"
EXPERTS = ("code", "law", "news")

MERGE = """
import json, sys, expertctl
try:
    manifest = expertctl.Workspace(sys.argv[1]).merge(
        sys.argv[2], method="trimmed_mean", experts=["code", "law", "news"], options={"trim": int(sys.argv[3])}
    )
    print(json.dumps({"options": manifest.merged.options, "versions": dict(manifest.versions)}))
except expertctl.UserError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plugin, installed by pip into a folder of its own without asking any index."""
    copy = tmp_path_factory.mktemp("source") / "plugin"  # so that building leaves nothing in the repository
    shutil.copytree(EXAMPLE, copy)
    target = tmp_path_factory.mktemp("site")
    command = "-m pip install --quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check --target"
    done = subprocess.run(
        [sys.executable, *command.split(), str(target), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"the plugin cannot be installed (setuptools here?):\n{done.stderr}"
    return target


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, new_workspace: Any) -> Path:
    return new_workspace(tmp_path_factory.mktemp("plugin") / "ws", EXPERTS)


def merge(site: Path, workspace: Path, name: str, trim: int, **environment: str) -> dict[str, Any]:
    inherited = {key: value for key, value in os.environ.items() if key != "EXPERTCTL_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-c", MERGE, str(workspace), name, str(trim)],
        env=inherited | {"PYTHONPATH": str(site)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_installed_plugin_merges_as_a_naive_computation_does(site: Path, workspace: Path) -> None:
    told = merge(site, workspace, "m", 1)
    assert told["options"] == {"trim": 1}
    assert told["versions"]["expertctl-trimmed-mean"] == "0.1.0"
    tensors = load_file(workspace / "generalists" / "m" / "model.safetensors")
    members = [load_file(workspace / "experts" / name / "model.safetensors") for name in EXPERTS]
    for name, tensor in tensors.items():
        values = zip(*(member[name].flatten().tolist() for member in members), strict=True)
        middle = torch.tensor([sorted(of_one)[1] for of_one in values]).reshape(tensor.shape)
        torch.testing.assert_close(tensor, middle)


def test_too_much_trimming_is_a_users_error_and_leaves_nothing(site: Path, workspace: Path) -> None:
    assert merge(site, workspace, "n", 2) == {"error": "trim 2 leaves nothing of 3 experts; it is 0 to 1"}
    assert not (workspace / "generalists" / "n").exists()


def test_an_empty_selection_hides_the_plugin(site: Path, workspace: Path) -> None:
    told = merge(site, workspace, "n", 1, EXPERTCTL_PLUGINS="")
    assert told["error"].startswith("no merge method 'trimmed_mean'")
    assert "average" in told["error"]


def test_the_method_has_the_properties_of_a_merge(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plugin author's own test would be."""
    monkeypatch.syspath_prepend(str(site))
    import expertctl_trimmed_mean as plugin

    from expertctl.core.testing import assert_merge_ok, fresh_plugins

    assert_merge_ok(plugin.trimmed_mean, plugin.Options(trim=1))
    assert_merge_ok(plugin.trimmed_mean, plugin.Options(trim=2), num_experts=5)
    manager = fresh_plugins(plugin)
    assert manager.problems == []
    assert manager.offer(MergeMethod, "trimmed_mean").merge is plugin.trimmed_mean


def test_the_example_stays_as_small_as_it_claims() -> None:
    (module,) = EXAMPLE.glob("*.py")
    assert len(module.read_text(encoding="utf-8").splitlines()) < 45
    assert sorted(path.name for path in EXAMPLE.iterdir() if path.name != "__pycache__") == [
        "README.md",
        "expertctl_trimmed_mean.py",
        "pyproject.toml",
    ]
