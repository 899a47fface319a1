"""What many tests share: no network, no foreign plugins, and workspaces that are made without training."""

from __future__ import annotations

import os
import tempfile

# Before anything imports torch or transformers, and for the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["EXPERTCTL_PLUGINS"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="expertctl-tests-")

import inspect
import json
import random
import shutil
import signal
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pytest
from made_experts import write_expert

from expertctl.core.testing import tiny_model_folder
from expertctl.workspace import Workspace

FEED_FORWARD = "model.layers.*.mlp.*"

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; the tests send it on purpose.
signal.signal(signal.SIGINT, signal.default_int_handler)


class MakeWorkspace(Protocol):
    def __call__(
        self,
        folder: Path,
        experts: Sequence[str] = ...,
        *,
        family: str = ...,
        tied: bool = ...,
        dtype: str = ...,
        changed: str = ...,
        seed: int = ...,
        config: str = ...,
    ) -> Path: ...


def make_workspace(
    folder: Path,
    experts: Sequence[str] = ("code", "law", "news"),
    *,
    family: str = "olmo2",
    tied: bool = False,
    dtype: str = "float32",
    changed: str = "*",
    seed: int = 0,
    config: str = "training: {sequence_length: 16}\n",
) -> Path:
    """Make a workspace with a finished seed and finished experts; no training: experts are the seed plus noise.

    `changed` is the pattern of the tensors in which the experts differ from the seed.
    """
    from expertctl.core.artefacts.layout import Layout
    from expertctl.experts.runs.seed import import_seed

    folder.mkdir(parents=True)
    (folder / "expertctl.yaml").write_text(config, encoding="utf-8")
    origin = tiny_model_folder(folder / ".origin", family, seed=seed, tied=tied, dtype=dtype)
    import_seed(Layout(folder), origin, licence="CC0-1.0")
    for number, name in enumerate(experts, start=1):
        write_expert(folder, name, changed=changed, seed=1000 * seed + number)
    return folder


@pytest.fixture(scope="session")
def new_workspace() -> MakeWorkspace:
    """Makes workspaces; see `make_workspace`."""
    return make_workspace


@pytest.fixture(scope="session")
def new_expert() -> object:
    """Adds an expert to a workspace; see `write_expert`."""
    return write_expert


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMo-2-style Hugging Face folder. Read it, do not write to it."""
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "olmo2")


@pytest.fixture(scope="session")
def shared_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with experts code, law and news, which differ from the seed everywhere. Only read it."""
    return make_workspace(tmp_path_factory.mktemp("shared") / "workspace")


# --- projects that really train ---

TRAINING = {"tokens": 2_560, "sequence_length": 32, "batch_size": 4, "log_every": 5, "checkpoint_seconds": 0}


def write_domain(folder: Path, module: object, *, documents: int = 24) -> None:
    """Write the source of a module as `train.jsonl` and `valid.jsonl`, a few lines a document."""
    lines = inspect.getsource(module).splitlines()
    size = len(lines) // documents
    texts = ["\n".join(lines[index * size : (index + 1) * size]) for index in range(documents)]
    folder.mkdir(parents=True)
    for name, part in (("train", texts[: documents * 3 // 4]), ("valid", texts[documents * 3 // 4 :])):
        content = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")


def write_project(root: Path, training: dict[str, object] | None = None) -> Path:
    """Write a project of the domains `prose` (textwrap) and `chance` (random)."""
    write_domain(root / "text" / "prose", textwrap)
    write_domain(root / "text" / "chance", random)
    content = {
        "seed": {"preset": "tiny", "training": {"tokens": 1_280, "schedule_end": 0.5}},
        "training": {**TRAINING, **(training or {})},
        "domains": {
            name: {"train": f"text/{name}/train.jsonl", "valid": f"text/{name}/valid.jsonl"}
            for name in ("prose", "chance")
        },
    }
    (root / "expertctl.yaml").write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return root


@pytest.fixture(scope="session")
def seeded_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose seed was pretrained from scratch; to be copied, not changed."""
    from inline_launching import inline_launching

    root = write_project(tmp_path_factory.mktemp("project"))
    with inline_launching():
        Workspace(root).seed()
    return root


@pytest.fixture
def project(seeded_project: Path, tmp_path: Path) -> Workspace:
    """A copy of the project with its seed."""
    return Workspace(shutil.copytree(seeded_project, tmp_path / "project"))


@pytest.fixture(scope="session")
def flexolmo_workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with experts prose, chance and means, trained with `flexolmo`. Add generalists, change nothing else."""
    from flexolmo_workspaces import make_flexolmo_workspace

    return make_flexolmo_workspace(tmp_path_factory.mktemp("flexolmo") / "workspace")
