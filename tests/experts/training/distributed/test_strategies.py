"""One run in one process and in two, replicated and sharded: same losses, same tensors, checkpoints that fit each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed_runs import losses_of, train_together
from flexolmo_workspaces import DOMAINS, make_flexolmo_workspace, write_text
from safetensors.torch import load_file

from expertctl import Reporter, TuningSettings, Workspace, load_model, verify
from expertctl.experts.runs.seed import start_pretraining
from expertctl.experts.runs.tuning import start_tuning
from expertctl.experts.training.run import train_run

pytestmark = pytest.mark.slow
STEPS = 30
TRAINING = {"tokens": STEPS * 4 * 32, "log_every": 1, "learning_rate": 5e-3, "checkpoint_seconds": 1e6}
EXPERTS: dict[str, dict[str, Any]] = {
    "whole": {"trains": "all"},
    "feed-forward": {"trains": "feed_forward"},
    "pattern": {"trains": "model.layers.*.self_attn.*"},
    "lora": {"trains": "lora", "options": {"rank": 4}},
    "dora": {"trains": "lora", "options": {"rank": 4, "dora": True}},
    "prompt": {"trains": "prompt", "options": {"tokens": 4}},
    "residual": {"trains": "residual_prompt", "options": {"tokens": 4, "bottleneck": 16, "layers": 2}},
    "thrifty": {
        "trains": "feed_forward",
        "training": TRAINING
        | {"activation_checkpointing": True, "chunked_loss": True, "separate_documents": True}
        | {"background_checkpoints": True, "checkpoint_seconds": 0.5},
    },
    "owner": {"trains": "flexolmo", "options": {"public": "public", "samples": 4}},
}
TUNED: dict[str, tuple[str, TuningSettings]] = {
    "routers": ("mix", TuningSettings("router", ["prose", "chance"], training=TRAINING)),
    "mixture": ("mix", TuningSettings("mixture", ["prose", "chance"], training=TRAINING)),
    "stitches": ("stitched", TuningSettings("stitches", ["public", "prose", "chance"], training=TRAINING)),
    "demix": ("seed", TuningSettings("demix", ["prose", "chance", "means"], training=TRAINING)),
    "adapted": ("demix-base", TuningSettings("demix_dapt", ["means"], training=TRAINING)),
}
NOT_SHARDED = {"generalists/demix": "sharding needs a gradient for the same parameters"}
"""Which of its feed-forward networks have a gradient depends on the rows of a process."""
RUNS = (*(f"experts/{name}" for name in EXPERTS), *(f"generalists/{name}" for name in TUNED))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a run of every trainer that has not begun."""
    root = tmp_path_factory.mktemp("prepared") / "workspace"
    workspace = make_flexolmo_workspace(root, owners=("prose", "chance"), trains="all")
    workspace.merge("mix", method="btx")
    workspace.merge("stitched", method="stitch")
    for name, settings in EXPERTS.items():
        workspace.branch(name, domain="means", **{"training": TRAINING, **settings})
    start_tuning(workspace.layout, workspace.config, "demix-base", "seed", TuningSettings("demix", ["prose", "chance"]))
    train_run(root / "generalists" / "demix-base", Reporter(), lambda: False)
    for name, (base, settings) in TUNED.items():
        start_tuning(workspace.layout, workspace.config, name, base, settings)
    return root


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace after every run was trained in one process."""
    root = copied(prepared, tmp_path_factory.mktemp("alone"))
    for run in RUNS:
        train_run(root / run, Reporter(), lambda: False)
    return root


def copied(root: Path, folder: Path) -> Path:
    return Path(shutil.copytree(root, folder / "workspace", symlinks=True))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one_for_every_trainer(
    strategy: str, prepared: Path, alone: Path, tmp_path: Path
) -> None:
    root = copied(prepared, tmp_path)
    train_together(root, strategy, *RUNS)
    refused = NOT_SHARDED if strategy == "fsdp" else {}
    for rank in range(2):
        for line in (root / f"rank-{rank}.jsonl").read_text().splitlines():
            record = json.loads(line)
            assert (record["error"] or "").startswith(refused.get(record["run"], "")), record
            assert (record["error"] is None) == (record["run"] not in refused)
    for run in [run for run in RUNS if run not in refused]:
        expected, got = losses_of(alone, run), losses_of(root, run)
        assert len(expected) == STEPS
        assert got == pytest.approx(expected, abs=1e-4), run
        assert verify(root / run) == [], run
    for name in EXPERTS:
        files = sorted(path.name for path in (alone / "experts" / name).glob("*.safetensors"))
        for file in files:
            one, two = (load_file(base / "experts" / name / file) for base in (alone, root))
            assert one.keys() == two.keys()
            for tensor, value in one.items():
                torch.testing.assert_close(two[tensor], value, atol=2e-3, rtol=0)
    for name in [name for name in TUNED if f"generalists/{name}" not in refused]:
        model, _ = load_model(Workspace(root).generalists / name)
        other, _ = load_model(Workspace(alone).generalists / name)
        assert type(model) is type(other)
        tokens = torch.arange(1, 9)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, other(tokens).logits, atol=2e-2, rtol=0)


@pytest.mark.long
def test_a_run_resumes_on_other_numbers_of_processes_and_by_the_other_strategy(
    prepared: Path, alone: Path, tmp_path: Path
) -> None:
    root, runs = copied(prepared, tmp_path), ("experts/owner", "experts/whole", "generalists/mixture")
    train_together(root, "fsdp", *runs, stop_after=7)
    assert [len(losses_of(root, run)) for run in runs] == [7, 7, 7]
    train_together(root, "ddp", *runs, stop_after=7)
    assert [len(losses_of(root, run)) for run in runs] == [14, 14, 14]
    for run in runs:
        seen = [0]

        def stopped(seen: list[int] = seen) -> bool:
            seen[0] += 1
            return seen[0] == 7

        with pytest.raises(Exception, match="stopped at step 21"):
            train_run(root / run, Reporter(), stopped)
    train_together(root, "fsdp", *runs)
    for run in runs:
        assert losses_of(root, run) == pytest.approx(losses_of(alone, run), abs=1e-4), run
        assert verify(root / run) == []


@pytest.mark.clusters
def test_each_of_two_nodes_holds_the_model_in_parts(prepared: Path, alone: Path, tmp_path: Path) -> None:
    """Four processes that are told that two are on a node."""
    root, runs = copied(prepared, tmp_path), ("experts/owner", "experts/thrifty", "generalists/mixture")
    train_together(root, "hsdp", *runs, processes=4, on_a_node=2, stop_after=9)
    train_together(root, "hsdp", runs[0], processes=4, on_a_node=2)
    for run in runs[1:]:
        train_run(root / run, Reporter(), lambda: False)
    for run in runs:
        assert losses_of(root, run) == pytest.approx(losses_of(alone, run), abs=1e-4), run
        assert verify(root / run) == []


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_seed_is_pretrained_in_two_processes_as_in_one(strategy: str, tmp_path: Path) -> None:
    losses = {}
    for kind in ("alone", strategy):
        root = tmp_path / kind
        root.mkdir()
        domains = {name: write_text(root / "text" / name, DOMAINS[name]) for name in ("prose", "chance")}
        training = {**TRAINING, "sequence_length": 32, "batch_size": 4, "learning_rate": 1e-3}
        config = {"domains": domains, "seed": {"preset": "tiny", "training": training}}
        (root / "expertctl.yaml").write_text(yaml.safe_dump(config))
        workspace = Workspace(root)
        start_pretraining(workspace.layout, workspace.config)
        if kind == "alone":
            train_run(root / "seed", Reporter(), lambda: False)
        else:
            train_together(root, strategy, "seed")
        losses[kind] = losses_of(root, "seed")
        assert verify(root / "seed") == []
    assert len(losses["alone"]) == STEPS
    assert losses[strategy] == pytest.approx(losses["alone"], abs=1e-4)
