"""mergekit-moe's files: the same experts and prompts, and what is refused by key."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from expertctl import UserError, load_model
from expertctl.core.testing import tiny_model_folder
from expertctl.merge.merging import MergeRun, merge_recipe, plan_recipe
from expertctl.merge.mixture.changing import Change
from expertctl.merge.recipes.mergekit_file import read_mergekit
from expertctl.merge.remaking.expert_changes import change_experts
from expertctl.merge.remaking.reproducing import reproduce

PROMPTS = [
    {"source_model": "a", "positive_prompts": ["def area(width):", "return 1"]},
    {"source_model": "b", "positive_prompts": ["Whereas the parties"], "negative_prompts": ["def"]},
]
NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""Tensors of a feed-forward network -> their names in Mixtral."""


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
        ({"shared_experts": [PROMPTS[0], PROMPTS[1]]}, r"moe.yml:\d+: more than one shared expert is not supported"),
        ({"shared_experts": [{"source_model": "a"}]}, r"moe.yml:13: gate_mode 'hidden' needs positive_prompts .* 'a'"),
        ({"shared_experts": [{"sourcemodel": "a"}]}, r"unknown key 'sourcemodel' in shared_experts.0 \(did you mean"),
        ({"experts": [{**PROMPTS[0], "noise_scale": -0.1}]}, r"moe.yml:\d+: experts.0.noise_scale: "),
        ({"experts": [{**PROMPTS[0], "residual_scale": "x"}]}, r"moe.yml:\d+: experts.0.residual_scale: "),
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


# --- noise and scale ---


def test_noise_and_scale_change_the_feed_forward_of_their_expert_only(read: Any, tmp_path: Path) -> None:
    experts = [{"source_model": "a", "noise_scale": 0.02}, {"source_model": "b", "residual_scale": 0.25}]
    recipe = read(gate_mode="random", experts=experts)
    manifest = merge_recipe(recipe, tmp_path / "out")
    mixture, a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "a", "b"))
    residuals = []
    for expert, ours in NAMES.items():
        for layer in range(2):
            first, second = (
                mixture[f"model.layers.{layer}.block_sparse_moe.experts.{n}.{ours}.weight"] for n in (0, 1)
            )
            dense = f"model.layers.{layer}.mlp.{expert}.weight"
            residuals.append((first - a[dense]).flatten())
            assert torch.equal(second, b[dense] * (0.25 if expert == "down_proj" else 1))
    noise = torch.cat(residuals)
    assert noise.std() == pytest.approx(0.02, rel=0.05)
    assert abs(noise.mean()) < 0.02 * 5 / len(noise) ** 0.5
    assert len(noise.unique()) > 0.9 * len(noise)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(mixture[norm], load_file(tmp_path / "base" / "model.safetensors")[norm])
    assert reproduce(manifest, tmp_path / "out", models={"base": tmp_path / "base"}).same


def test_copies_of_a_model_with_noise_differ(read: Any, tmp_path: Path) -> None:
    recipe = read(gate_mode="random", experts=[{"source_model": "a", "noise_scale": 0.1}] * 2)
    merge_recipe(recipe, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    first, second = (tensors[f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight"] for n in (0, 1))
    assert (first - second).std() == pytest.approx(0.1 * 2**0.5, rel=0.1)


def test_scales_are_kept_in_a_fused_layout(read: Any, tmp_path: Path) -> None:
    recipe = read(gate_mode="random", experts=[{"source_model": "a", "residual_scale": 0.5}, {"source_model": "b"}])
    options = {**recipe.scopes[0], "layout": "fused"}
    merge_recipe(replace(recipe, scopes=(options,)), tmp_path / "out")
    fused = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.experts.down_proj"]
    a, b = (load_file(tmp_path / n / "model.safetensors")["model.layers.1.mlp.down_proj.weight"] for n in "ab")
    assert torch.equal(fused, torch.stack([a * 0.5, b]))


def test_a_scale_of_a_family_without_down_proj_is_refused(read: Any, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        shutil.rmtree(tmp_path / name)
        tiny_model_folder(tmp_path / name, "gpt2")
    experts = [{"source_model": "a", "residual_scale": 0.5}, {"source_model": "b"}]
    with pytest.raises(UserError, match="residual_scale of 'a' scales the tensors 'down_proj', which"):
        plan_recipe(read(gate_mode="random", experts=experts), None)


# --- shared experts ---


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_shared_expert_is_added_to_the_routed_ones(read: Any, tmp_path: Path, family: str) -> None:
    """With copies of the base as experts, its share is the difference to the base; scaled by 0 there is none."""
    for name in ("base", "a", "b"):
        shutil.rmtree(tmp_path / name)
        tiny_model_folder(tmp_path / name, family)
        if family == "mistral":  # shorter than the text
            config = tmp_path / name / "config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "sliding_window": 4}))
    experts = [{"source_model": "a"}, {"source_model": "b"}]
    for scale in (0.0, 0.5):
        shared = [{"source_model": "a", "residual_scale": scale}]
        recipe = read(gate_mode="random", experts=experts, shared_experts=shared)
        merge_recipe(recipe, tmp_path / f"out-{scale}")
    models = {name: load_model(tmp_path / name, dtype="float32")[0] for name in ("base", "out-0.0", "out-0.5")}
    assert type(models["out-0.0"]).__name__ == "Qwen2MoeForCausalLM"
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        expected = models["base"](input_ids=tokens).logits
        torch.testing.assert_close(models["out-0.0"](input_ids=tokens).logits, expected, atol=2e-5, rtol=1e-5)
        block, dense = models["out-0.5"].model.layers[0].mlp, models["base"].model.layers[0].mlp
        states = torch.randn(1, 5, dense.gate_proj.in_features, generator=torch.Generator().manual_seed(0))
        gate = torch.sigmoid(states @ block.shared_expert_gate.weight[0])[..., None]
        torch.testing.assert_close(block(states), dense(states) * (1 + 0.5 * gate), atol=2e-5, rtol=1e-5)


def test_the_gate_of_a_shared_expert_is_the_router_row_of_its_prompts(read: Any, tmp_path: Path) -> None:
    third = {"source_model": "b", "positive_prompts": ["import torch"], "negative_prompts": ["the"]}
    routed = merge_recipe(read(experts=[*PROMPTS, third], experts_per_token=2), tmp_path / "routed")
    shared = merge_recipe(read(shared_experts=[third]), tmp_path / "shared")
    assert list(routed.merged.experts) == ["a", "b", "b#2"]
    assert list(shared.merged.experts) == ["a", "b"]
    assert shared.merged.mixture.shared_expert == "b#2"
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("shared", "routed"))
    source = load_file(tmp_path / "b" / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        rows = theirs[f"{prefix}.block_sparse_moe.gate.weight"]
        torch.testing.assert_close(ours[f"{prefix}.mlp.gate.weight"], rows[:2])
        torch.testing.assert_close(ours[f"{prefix}.mlp.shared_expert_gate.weight"], rows[2:])
        for name in NAMES:
            expected = source[f"{prefix}.mlp.{name}.weight"]
            assert torch.equal(ours[f"{prefix}.mlp.shared_expert.{name}.weight"], expected)
    assert reproduce(shared, tmp_path / "shared").same


def test_the_shared_expert_stays_when_others_leave(read: Any, tmp_path: Path) -> None:
    experts = [*PROMPTS, {**PROMPTS[0], "positive_prompts": ["import"]}]
    merge_recipe(read(gate_mode="random", experts=experts, shared_experts=[{"source_model": "b"}]), tmp_path / "out")
    merge_recipe(
        read(gate_mode="random", experts=experts[:2], shared_experts=[{"source_model": "b"}]), tmp_path / "two"
    )
    manifest = change_experts(tmp_path / "out", tmp_path / "less", Change(remove=("a#2",)))
    assert manifest.merged.experts == ("a", "b")
    assert manifest.merged.mixture.shared_expert == "b#2"
    less, before, two = (load_file(tmp_path / name / "model.safetensors") for name in ("less", "out", "two"))
    assert less.keys() == two.keys()
    for name, tensor in less.items():
        if "shared_expert" in name:
            assert torch.equal(tensor, before[name])
        elif ".gate.weight" not in name:
            assert torch.equal(tensor, two[name])
    load_model(tmp_path / "less")


def test_classes_and_families_without_a_shared_expert_are_refused(read: Any, tmp_path: Path) -> None:
    shared = {"gate_mode": "random", "shared_experts": [{"source_model": "a"}]}
    with pytest.raises(UserError, match=r"as 'mixtral' .*it has no shared expert; supported: 'qwen2_moe'"):
        plan_recipe(read(**shared, architecture="mixtral"), None)
    for name in ("base", "a", "b"):
        shutil.rmtree(tmp_path / name)
        tiny_model_folder(tmp_path / name, "olmo2")
    with pytest.raises(
        UserError, match=r"'olmo2' models with these settings cannot be written \('flex_olmo': it has no"
    ):
        plan_recipe(read(**shared), None)


def test_another_architecture_than_the_base_is_refused_with_the_tensor(read: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "b")
    tiny_model_folder(tmp_path / "b", "olmo2")
    run = MergeRun(allow_unrelated=True)
    with pytest.raises(UserError, match=r"tensor '.*' is in"):
        merge_recipe(read(gate_mode="random"), tmp_path / "out", run=run)
