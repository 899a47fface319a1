"""mergekit-moe's files: the same experts and prompts, and what is refused by key."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from expertctl import UserError
from expertctl.core.testing import tiny_model_folder
from expertctl.merge.merging import MergeRun, merge_recipe, plan_recipe
from expertctl.merge.recipes.mergekit_file import read_mergekit

PROMPTS = [
    {"source_model": "a", "positive_prompts": ["def area(width):", "return 1"]},
    {"source_model": "b", "positive_prompts": ["Whereas the parties"], "negative_prompts": ["def"]},
]


@pytest.fixture
def read(tmp_path: Path) -> Any:
    base = tiny_model_folder(tmp_path / "base", "llama")
    for number, name in enumerate("ab"):
        folder = shutil.copytree(base, tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        noise = torch.Generator().manual_seed(number)
        changed = {key: tensor + 0.1 * torch.randn(tensor.shape, generator=noise) for key, tensor in tensors.items()}
        from safetensors.torch import save_file

        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    def call(**content: Any) -> Any:
        path = tmp_path / "moe.yml"
        path.write_text(yaml.safe_dump({"base_model": "base", "experts": PROMPTS, **content}, sort_keys=False))
        return read_mergekit(path)

    return call


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"])
def test_every_gate_mode_makes_a_mixture(read: Any, tmp_path: Path, mode: str) -> None:
    manifest = merge_recipe(read(gate_mode=mode), tmp_path / "out")
    assert list(manifest.merged.experts) == ["a", "b"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(
        tensors["model.layers.1.self_attn.q_proj.weight"], base["model.layers.1.self_attn.q_proj.weight"]
    )
    for number, name in enumerate("ab"):
        source = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(
            tensors[f"model.layers.0.block_sparse_moe.experts.{number}.w2.weight"],
            source["model.layers.0.mlp.down_proj.weight"],
        )
    gates = [tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"].numpy() for layer in range(2)]
    assert all(np.abs(gate).max() > 0 for gate in gates)
    assert np.array_equal(*gates) == (mode == "cheap_embed")


def test_a_plan_runs_no_model(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import expertctl.core.models.loading as loading

    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    plan = plan_recipe(read(), None)
    assert any("dropped" in note for note in plan.notes) or plan.assembly is not None


def test_one_model_may_be_several_experts(read: Any, tmp_path: Path) -> None:
    recipe = read(experts=[*PROMPTS, {**PROMPTS[0], "positive_prompts": ["import"]}], experts_per_token=3)
    assert recipe.experts == ("a", "b", "a#2")
    assert merge_recipe(recipe, tmp_path / "out").merged.mixture.top_k == 3


def test_dtype_and_architecture(read: Any, tmp_path: Path) -> None:
    recipe = read(gate_mode="random", dtype="bfloat16", architecture="Mixtral")
    merge_recipe(recipe, tmp_path / "out")
    gate = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
    assert gate.float().std() == pytest.approx(1, rel=0.4)  # as theirs
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"gate_mode": "hiden"}, r"moe.yml:\d+: no gate_mode 'hiden' .did you mean 'hidden'"),
        ({"shared_experts": [{"source_model": "a"}]}, r"moe.yml:\d+: 'shared_experts' is not supported"),
        ({"experts": [{**PROMPTS[0], "noise_scale": 0.1}]}, "'noise_scale' is not supported"),
        ({"architecture": "deepseek"}, "no architecture 'deepseek'"),
        (
            {"experts": [PROMPTS[0], {**PROMPTS[0], "source_model": "b"}]},
            r"moe.yml:\d+: all experts have the same prompts",
        ),
        ({"experts": [{"source_model": "nowhere"}]}, "there is no folder nowhere"),
        ({"expert_per_token": 2}, r"unknown key 'expert_per_token' \(did you mean 'experts_per_token'"),
    ],
)
def test_unsupported_keys_are_refused_by_name(read: Any, content: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        read(**content)


def test_more_experts_than_there_are_and_missing_prompts_are_refused(read: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"moe.yml:\d+: 'experts_per_token' is 3, but there are only 2 experts"):
        merge_recipe(read(gate_mode="random", experts_per_token=3), tmp_path / "out")
    for prompts in ({}, {"positive_prompts": [" "]}):
        with pytest.raises(
            UserError,
            match=r"moe.yml:\d+: gate_mode 'hidden' needs positive_prompts \(example texts\) for 'b'",
        ):
            read(experts=[PROMPTS[0], {"source_model": "b", **prompts}])
    with pytest.raises(UserError, match=r"moe.yml:\d+: 'int8' is not a supported dtype"):
        read(dtype="int8")
    with pytest.raises(UserError, match=r"moe.yml:\d+: experts: "):
        read(experts=[])
    assert not (tmp_path / "out").exists()


def test_another_architecture_than_the_base_is_refused_with_the_tensor(read: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "b")
    tiny_model_folder(tmp_path / "b", "olmo2")
    run = MergeRun(allow_unrelated=True)
    with pytest.raises(UserError, match=r"tensor '.*' is in"):
        merge_recipe(read(gate_mode="random"), tmp_path / "out", run=run)
