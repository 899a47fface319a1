"""A mixture whose experts are on different processes trains, resumes and is written as by one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from distributed_runs import losses_of, records_of, train_together
from flexolmo_workspaces import make_flexolmo_workspace
from safetensors.torch import load_file
from tiny_families import family_folder

from expertctl import Reporter, TuningSettings, UserError, verify
from expertctl.core.errors import Interrupted
from expertctl.core.models.outline import outline_of
from expertctl.experts.runs.tuning import start_tuning
from expertctl.experts.training.distributed.experts_apart import expert_plan
from expertctl.experts.training.run import LOADED_WHOLE, train_run

STEPS = 12
TRAINING = {"tokens": STEPS * 6 * 32, "batch_size": 6, "log_every": 1, "learning_rate": 5e-3, "checkpoint_seconds": 1e6}


@pytest.mark.slow
@pytest.mark.long
def test_a_mixture_trains_and_is_written_as_by_one_process(tmp_path: Path) -> None:
    root = tmp_path / "alone"
    workspace = make_flexolmo_workspace(root, owners=("prose", "chance"), trains="all")
    workspace.merge("mix", method="btx")
    workspace.branch("plain", domain="means", training=TRAINING)
    training = {**TRAINING, "sharded_checkpoints": True}
    for name, trains in (("mixture", "mixture"), ("routers", "router")):
        settings = TuningSettings(trains, ["prose", "chance"], training=training)
        start_tuning(workspace.layout, workspace.config, name, "mix", settings)
    together = Path(shutil.copytree(root, tmp_path / "together", symlinks=True))
    mixture, routers, plain = "generalists/mixture", "generalists/routers", "experts/plain"

    train_together(together, "ep", mixture, stop_after=4)
    (state,) = (together / mixture).glob(".training/step-*")
    assert (state / "weights-00001-of-00002.safetensors").is_file()
    train_together(together, "fsdp", mixture, stop_after=2)
    seen = [0]

    def stopped() -> bool:
        seen[0] += 1
        return seen[0] == 2

    with pytest.raises(Interrupted, match="stopped at step 8"):
        train_run(together / mixture, Reporter(), stopped)
    train_together(together, "ep", mixture, routers, plain)
    assert LOADED_WHOLE not in records_of(together)[mixture]["notes"]  # each process has read its experts only
    for rank in range(2):
        assert records_of(together, rank)[plain]["error"].startswith(
            "transformers has no plan for expert parallelism of Olmo2ForCausalLM"
        )
    for run in (mixture, routers):
        train_run(root / run, Reporter(), lambda: False)
        assert len(losses_of(root, run)) == STEPS
        assert losses_of(together, run) == pytest.approx(losses_of(root, run), abs=1e-4), run
        assert verify(together / run) == []
        one, two = (load_file(base / run / "model.safetensors") for base in (root, together))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=2e-3, rtol=0)
        configs = [json.loads((base / run / "config.json").read_text()) for base in (root, together)]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "flex_olmo"])
def test_experts_are_shared_equally(family: str, tmp_path: Path) -> None:
    outline = outline_of(family_folder(tmp_path, family))
    assert outline is not None
    plan = expert_plan(outline.model, 2)
    assert set(plan.values()) == {"grouped_gemm", "ep_dispatch_experts"}
    with pytest.raises(UserError, match="3 processes cannot share the 4 experts of"):
        expert_plan(outline.model, 3)


def test_models_without_a_plan_are_refused_by_name(tmp_path: Path) -> None:
    outline = outline_of(family_folder(tmp_path, "llama"))
    assert outline is not None
    with pytest.raises(UserError, match="no plan for expert parallelism of LlamaForCausalLM; use --strategy fsdp"):
        expert_plan(outline.model, 2)
