"""Copies of one model as a mixture are that model, whichever class the mixture is written as."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from mixtures_of_copies import TOKENS, copies, mix
from safetensors.torch import load_file

from expertctl import UserError, load_model
from expertctl.core.manifests.manifest import read_manifest
from expertctl.merge.merging import merge_recipe
from expertctl.merge.recipes.recipe import Recipe, whole_models

NATIVE = {
    "olmo2": "FlexOlmoForCausalLM",
    "llama": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
}
CONTAINED = ["olmo", "gemma", "gemma2", "gemma3_text", "gpt2"]
NOT_DESCRIBED = [
    "phi",
    "phi3",
    "gpt_neox",
    "stablelm",
    "starcoder2",
    "granite",
    "smollm3",
    "glm4",
    "cohere2",
]
"""Families that no plugin describes."""


def logits(folder: Path) -> torch.Tensor:
    model, _ = load_model(folder, dtype="float32")
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*NATIVE, *CONTAINED])
@pytest.mark.parametrize(("count", "top_k"), [(2, 1), (3, 2), (4, 4)])
def test_copies_of_the_seed_give_the_seed(tmp_path: Path, family: str, count: int, top_k: int, tied: bool) -> None:
    models = copies(tmp_path, family, count, tied=tied)
    folder = mix(tmp_path, models, top_k=top_k)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        NATIVE.get(family, "MixtureForCausalLM")
    ]
    expected = logits(models["base"])
    torch.testing.assert_close(logits(folder), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", NATIVE)
def test_the_container_takes_every_family_and_gives_the_same(tmp_path: Path, family: str) -> None:
    models = copies(tmp_path, family, 2)
    for number in range(2):
        differ(models[f"copy{number}"], number)
    native = logits(mix(tmp_path, models, router="random", router_options={"deviation": 1.0}))
    shutil.rmtree(tmp_path / "mixture")
    ours = logits(mix(tmp_path, models, router="random", router_options={"deviation": 1.0}, target="container"))
    torch.testing.assert_close(ours, native, atol=1e-4, rtol=1e-4)


def differ(folder: Path, seed: int) -> None:
    """Change a model's feed-forwards in place."""
    from safetensors.torch import save_file

    source = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".mlp." in name:
            tensors[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=source)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("family", NATIVE)
def test_plain_transformers_finds_every_key_and_none_too_many(tmp_path: Path, family: str, layout: str) -> None:
    models = copies(tmp_path, family, 3)
    for number in range(3):
        differ(models[f"copy{number}"], number)
    folder = mix(tmp_path, models, layout=layout, with_seed=True)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == NATIVE[family]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    other = mix_again(tmp_path, models, layout)
    assert torch.equal(logits(folder), logits(other)), "both layouts are the same model"
    generated = model.generate(TOKENS[:1, :5], max_new_tokens=4, do_sample=False)
    assert generated.shape[1] <= 9


def mix_again(folder: Path, models: dict[str, Path], layout: str) -> Path:
    names = [name for name in models if name != "base"]
    other = "fused" if layout == "per_expert" else "per_expert"
    options = {"router": "random", "layout": other, "with_seed": True}
    recipe = Recipe("mixture", models, whole_models(names), seed="base", scopes=(options,))
    merge_recipe(recipe, folder / "other")
    return folder / "other"


@pytest.mark.parametrize("family", [*NATIVE, "gemma2"])
def test_the_forward_pass_is_the_gated_sum_of_the_experts(tmp_path: Path, family: str) -> None:
    """A mixture with all experts and no router is the seed whose feed-forwards are averaged in their outputs."""
    models = copies(tmp_path, family, 3)
    for number in range(3):
        differ(models[f"copy{number}"], number)
    mixture, _ = load_model(mix(tmp_path, models, router="uniform", top_k=3), dtype="float32")
    from expertctl.core.models.feed_forwards import feed_forwards

    members = [load_model(models[f"copy{number}"], dtype="float32")[0] for number in range(3)]
    dense, _ = load_model(models["base"], dtype="float32")

    class Mean(torch.nn.Module):
        def __init__(self, parts: list[torch.nn.Module]) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList(parts)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([part(x) for part in self.parts]).mean(dim=0)

    inside = [feed_forwards(member) for member in members]
    for layer, part in enumerate(feed_forwards(dense)):
        setattr(part.parent, part.attribute, Mean([member[layer].module for member in inside]))
    with torch.inference_mode():
        torch.testing.assert_close(
            mixture(input_ids=TOKENS).logits, dense(input_ids=TOKENS).logits, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2"])
def test_every_experts_tensor_can_be_traced_to_its_source(tmp_path: Path, family: str) -> None:
    models = copies(tmp_path, family, 2)
    for number in range(2):
        differ(models[f"copy{number}"], number)
    folder = mix(tmp_path, models)
    from expertctl.core.artefacts.safetensors_io import Checkpoint

    there = set(read_manifest(folder).tensors.values())
    for number in range(2):
        digests = Checkpoint.of_folder(models[f"copy{number}"]).digests()
        inside = {name: digest for name, digest in digests.items() if ".mlp." in name}
        assert inside
        assert set(inside.values()) <= there


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_as_it_is(tmp_path: Path, dtype: str) -> None:
    models = copies(tmp_path, "llama", 2, dtype=dtype)
    tensors = load_file(mix(tmp_path, models) / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    base = load_file(models["base"] / "model.safetensors")
    assert torch.equal(
        tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"],
        base["model.layers.0.mlp.up_proj.weight"],
    )


def test_the_container_generates_with_a_cache_as_it_does_without(tmp_path: Path) -> None:
    models = copies(tmp_path, "gpt2", 3)
    for number in range(3):
        differ(models[f"copy{number}"], number)
    model, _ = load_model(mix(tmp_path, models), dtype="float32")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(TOKENS[:1, :6], use_cache=True, **settings)
    assert torch.equal(cached, model.generate(TOKENS[:1, :6], use_cache=False, **settings))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float32"])
def test_a_container_is_loaded_in_any_precision_whatever_its_dense_models_was(tmp_path: Path, dtype: str) -> None:
    models = copies(tmp_path, "llama", 2, dtype="bfloat16")
    for model in models.values():
        config = json.loads((model / "config.json").read_text()) | {"dtype": "bfloat16"}
        (model / "config.json").write_text(json.dumps(config))
    model, _ = load_model(mix(tmp_path, models, target="container"), dtype=dtype)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
    assert model(input_ids=TOKENS).logits.isfinite().all()


def test_a_mixture_of_float64_is_refused_where_its_class_cannot_run_it(tmp_path: Path) -> None:
    models = copies(tmp_path, "llama", 2, dtype="float64")
    with pytest.raises(UserError, match=r"cannot compute in float64; choose the output dtype"):
        mix(tmp_path, models)
    model, _ = load_model(mix(tmp_path, models, target="container"))
    assert model(input_ids=TOKENS).logits.dtype == torch.float64
    recipe = Recipe(
        "mixture", models, whole_models(("copy0", "copy1")), "base", scopes=({"router": "random"},), dtype="F32"
    )
    merge_recipe(recipe, tmp_path / "single")
    single = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "single")
    assert single(input_ids=TOKENS).logits.dtype == torch.float32


def test_a_container_saved_by_transformers_is_loaded_again(tmp_path: Path) -> None:
    models = copies(tmp_path, "gemma2", 2, tied=True)
    model, tokenizer = load_model(mix(tmp_path, models), dtype="float32")
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "mixture"))


@pytest.mark.parametrize("family", NOT_DESCRIBED)
def test_undescribed_families_run_in_the_container(tmp_path: Path, family: str) -> None:
    models = copies(tmp_path, family, 3)
    folder = mix(tmp_path, models, top_k=2)
    torch.testing.assert_close(logits(folder), logits(models["base"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("bloom", "BloomMLP\\) takes hidden_states, residual"),
        ("opt", "feed-forward network of family 'opt' is not a single module"),
    ],
)
def test_families_without_feed_forwards_of_their_own_are_refused(tmp_path: Path, family: str, said: str) -> None:
    models = copies(tmp_path, family, 2)
    with pytest.raises(UserError, match=said):
        mix(tmp_path, models)
    assert not (tmp_path / "mixture").exists()
