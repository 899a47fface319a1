"""mergekit configuration files: all forms, defaults, and errors by key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_models import random_tensors, tensors_of, write_model

from expertctl.core.errors import UserError
from expertctl.merge.merging import merge_recipe, plan_recipe
from expertctl.merge.recipes.mergekit_file import METHODS, read_mergekit
from expertctl.merge.recipes.recipe import TokenSource
from expertctl.merge.remaking.reproducing import reproduce

GOLDEN = Path(__file__).parents[2] / "goldens" / "mergekit"
TWO = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 2}}]


@pytest.fixture
def read(tmp_path: Path) -> Any:
    for seed, name in enumerate(("base", "a", "b")):
        source = torch.Generator().manual_seed(seed)
        values = {
            key: tensor + 0.1 * torch.randn(tensor.shape, generator=source)
            for key, tensor in random_tensors(0, layers=4).items()
        }
        write_model(tmp_path / name, values)

    def call(**content: Any) -> Any:
        path = tmp_path / "recipe.yml"
        path.write_text(content.pop("text", None) or yaml.safe_dump(content, sort_keys=False))
        return read_mergekit(path)

    return call


def options_of(recipe: Any, tensor: str = "lm_head.weight") -> Any:
    return next(planned for planned in plan_recipe(recipe, None).stack.tensors if planned.name == tensor)


def test_models_beside_the_file_are_found_and_keep_their_order(read: Any, tmp_path: Path) -> None:
    recipe = read(merge_method="linear", models=TWO)
    assert recipe.models == {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert recipe.seed is None
    assert options_of(recipe).weights == (1.0, 2.0)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_of_the_table_merges(read: Any, tmp_path: Path, name: str) -> None:
    one_expert = name in ("nearswap", "arcee_fusion")
    models = [{"model": "a", "parameters": {"weight": 1}}]
    if not one_expert and name != "passthrough":
        models.append({"model": "base" if name == "slerp" else "b", "parameters": {"weight": 2}})
    if "weight" not in METHODS[name].required:
        models = [{"model": model["model"]} for model in models]
    content: dict[str, Any] = {"merge_method": name, "models": models}
    if METHODS[name].base in ("seed", "first"):
        content["base_model"] = "base"
    if "t" in METHODS[name].required:
        content["parameters"] = {"t": 0.4}
    merge_recipe(read(**content), tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == random_tensors(0, layers=4).keys()


def test_mergekits_defaults_are_filled_in(read: Any) -> None:
    ties = options_of(read(merge_method="ties", base_model="base", models=TWO)).options
    assert (ties.density, ties.normalize, ties.lambda_) == (1.0, True, 1.0)
    dare = options_of(read(merge_method="dare_ties", base_model="base", models=TWO)).options
    assert (dare.density, dare.rescale, dare.normalize) == (1.0, "l1", False)
    parameters = {"rescale": False, "int8_mask": True, "density": 0.3}
    plain = options_of(read(merge_method="dare_ties", base_model="base", models=TWO, parameters=parameters)).options
    assert (plain.density, plain.rescale) == (0.3, "none")


def test_slerp_goes_from_the_base_whatever_the_order(read: Any) -> None:
    for models in (["a", "base"], ["base", "a"], ["a"]):
        recipe = read(
            merge_method="slerp",
            base_model="base",
            models=[{"model": model} for model in models],
            parameters={"t": 0.3},
        )
        options = options_of(recipe)
        assert options.expert_names == ("base", "a")
        assert options.options.t == 0.3


def test_a_base_is_an_input_like_others_for_linear_and_must_have_a_weight(read: Any) -> None:
    listed = read(
        merge_method="linear",
        base_model="base",
        models=[*TWO, {"model": "base", "parameters": {"weight": 3}}],
    )
    assert options_of(listed).weights == (1.0, 2.0, 3.0)
    with pytest.raises(UserError, match=r"needs the parameter 'weight', .* of 'base'"):
        options_of(read(merge_method="linear", base_model="base", models=TWO))


def test_a_required_parameter_is_needed_for_every_tensor(read: Any) -> None:
    only_mlp = [{"filter": "mlp", "value": 0.5}]
    models = [{"model": "a", "parameters": {"weight": only_mlp}}, {"model": "b", "parameters": {"weight": 1}}]
    with pytest.raises(UserError, match=r"'weight', .* tensor 'model\.embed_tokens\.weight' of 'a'"):
        options_of(read(merge_method="linear", models=models))
    slerp = {"merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}]}
    with pytest.raises(UserError, match=r"'t', which is not set for tensor 'model\.embed_tokens\.weight'"):
        options_of(read(**slerp, parameters={"t": only_mlp}))


def test_numbers_may_be_written_with_an_exponent_alone(read: Any) -> None:
    text = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1e-3}}\n"
    assert options_of(read(text=text)).weights == (0.001,)


def test_a_mean_on_the_sphere_takes_no_weights(read: Any) -> None:
    assert options_of(read(merge_method="karcher", models=TWO)).weights == (1.0, 1.0)


def test_interpolation_of_task_vectors_where_there_is_a_base(read: Any) -> None:
    with_base = options_of(read(merge_method="multislerp", base_model="base", models=TWO))
    assert with_base.options.task_vectors
    assert with_base.expert_names == ("a", "b")
    assert not options_of(read(merge_method="multislerp", models=TWO)).options.task_vectors
    sources = [{"model": name, "layer_range": [0, 4], "parameters": {"weight": 1}} for name in ("a", "b", "base")]
    in_slice = options_of(read(merge_method="nuslerp", slices=[{"sources": sources, "base_model": "base"}]))
    assert in_slice.options.task_vectors
    assert (in_slice.expert_names, in_slice.seed_name) == (("a", "b"), "base")


def test_slices_with_gradients_and_bases_of_their_own(read: Any) -> None:
    sources = [{"model": "base", "layer_range": [0, 3]}, {"model": "a", "layer_range": [1, 4]}]
    recipe = read(
        merge_method="slerp",
        base_model="base",
        slices=[{"sources": sources, "parameters": {"t": [0, 1]}}],
        parameters={"t": 0.5},
    )
    plan = plan_recipe(recipe, None)
    factors = {tensor.name: tensor.options.t for tensor in plan.stack.tensors}
    assert [factors[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)] == [0.0, 0.5, 1.0]
    assert factors["lm_head.weight"] == 0.0
    inputs = next(tensor for tensor in plan.stack.tensors if tensor.name == "model.layers.0.mlp.up_proj.weight").experts
    assert [source.name for source in inputs] == [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]


def test_a_single_module_equals_its_content(read: Any) -> None:
    recipe = read(merge_method="linear", modules={"default": {"models": TWO, "parameters": {"normalize": False}}})
    assert not options_of(recipe).options.normalize
    with pytest.raises(UserError, match=r"recipe.yml:2: several modules \(text, vision\)"):
        read(merge_method="linear", modules={"text": {"models": TWO}, "vision": {"models": TWO}})


def test_dtypes_and_tokenizers(read: Any) -> None:
    recipe = read(merge_method="linear", models=TWO, dtype="bfloat16", out_dtype="float32")
    assert (recipe.input_dtype, recipe.dtype) == ("BF16", "F32")
    assert read(merge_method="linear", models=TWO, dtype="bfloat16").dtype == "BF16"
    assert read(merge_method="linear", models=TWO, tokenizer_source="union").tokenizer == "union"
    tokenizer = {"source": "a", "tokens": {"<x>": {"source": "b", "force": True}}, "pad_to_multiple_of": 64}
    given = read(merge_method="linear", models=TWO, tokenizer=tokenizer)
    assert (given.tokenizer, given.pad_to_multiple_of) == ("a", 64)
    assert given.tokens["<x>"].force


def test_adapters_are_named_by_their_base(read: Any, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    for model in ("base+lora", {"model": {"path": "base"}, "lora": {"path": "lora"}}):
        recipe = read(merge_method="linear", models=[{"model": model, "parameters": {"weight": 1}}])
        assert recipe.models == {"lora": tmp_path / "lora"}
        assert recipe.adapter_bases == {"lora": tmp_path / "base"}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"merge_method": "linaer", "models": TWO}, r":1: .*no merge method 'linaer' \(did you mean 'linear'"),
        ({"merge_method": "linear", "models": TWO, "modles": []}, r":\d+: unknown key 'modles' \(did you mean 'modules'"),
        ({"merge_method": "linear"}, "give exactly one of 'models', 'slices' and 'modules'"),
        ({"merge_method": "ties", "models": TWO}, "needs a base_model"),
        ({"merge_method": "linear", "models": [{"model": "org/name"}]}, r":3: there is no folder org/name and .* hf download org/name$"),
        ({"merge_method": "linear", "models": [{"model": "org/name@v2"}]}, "hf download org/name --revision v2$"),
        ({"merge_method": "linear", "models": [{"model": "nowhere"}]}, "there is no folder nowhere$"),
        ({"merge_method": "linear", "models": [{"model": "a@v2"}]}, "a is a folder, which has no revision 'v2'; remove '@v2'"),
        ({"merge_method": "linear", "models": [TWO[0], TWO[0]]}, "model 'a' is given twice"),
        ({"merge_method": "linear", "models": TWO, "dtype": "int3"}, ":[0-9]+: 'int3' is not a supported dtype"),
        ({"merge_method": "linear", "models": TWO, "tokenizer_source": "base", "tokenizer": {}}, "not both"),
        (
            {"merge_method": "ties", "base_model": "base", "models": TWO, "parameters": {"rescale": True}},
            "'rescale: true' is not supported for 'ties'",
        ),
        (
            {"merge_method": "linear", "models": TWO, "tokenizer": {"tokens": {"x": {"source": {"kind": "zreo"}}}}},
            r":12: no kind of source 'zreo' \(did you mean 'zero'",
        ),
        (
            {"merge_method": "linear", "models": TWO, "tokenizer": {"tokens": {"x": {"force": True}}}},
            ":11: token 'x' has no source; name a model",
        ),
        (
            {"merge_method": "linear", "models": TWO, "tokenizer": {"tokens": {"x": {"source": "base"}}}},
            ":11: the row of token 'x' comes from 'base', which is not one of the merged models: a, b",
        ),
        (
            {"merge_method": "linear", "models": TWO, "tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}},
            "needs a 'model', and one of 'token' and 'token_id'",
        ),
        (
            {"merge_method": "linear", "models": TWO, "tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token_id": "5"}}}}},
            "'token' must be a text, and 'token_id' a number",
        ),
        (
            {"merge_method": "linear", "models": TWO, "tokenizer": {"tokens": {"x": {"source": {"kind": "zero", "model": "a"}}}}},
            "a source of kind 'zero' has no key 'model'",
        ),
        ({"merge_method": "linear", "models": TWO, "chat_template": "chatlm"}, r":9: no chat_template 'chatlm' \(did you mean 'chatml'"),
        ({"merge_method": "linear", "models": TWO, "parameters": {"weight": [1, {"value": 2}]}}, ":10: parameter 'weight' mixes numbers and"),
        ({"merge_method": "linear", "models": TWO, "parameters": {"weight": []}}, ":10: parameter 'weight' is an empty list"),
        ({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": [{"filter": 1, "value": 2}]}}]}, ":5: parameter 'weight': .* is not a condition"),
        (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}], "residual_weight": 0.5}]},
            "'residual_weight' is not supported",
        ),
    ],
)  # fmt: skip
def test_unknown_keys_are_refused_by_name(read: Any, content: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        read(**content)
    assert "\n" not in str(caught.value)


def slices_of(*sources: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"sources": list(sources)}]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (
            {"merge_method": "linear", "models": [TWO[0], {"model": "b"}]},
            r":6: .* needs the parameter 'weight', .* of 'b'$",
        ),
        (
            {"merge_method": "linear", "models": [TWO[0], {"model": "b", "parameters": {"weight": "two"}}]},
            ":6: the weight of 'b' is 'two', which is not a number$",
        ),
        (
            {"merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}]},
            r":3: .* needs the parameter 't', which is not set for tensor '",
        ),
        (
            {"merge_method": "nearswap", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 1}},
            r":3: merge method 'nearswap' takes 1 expert, but this merge has 2: a, b$",
        ),
        (
            {"merge_method": "ties", "base_model": "base", "models": TWO, "parameters": {"density": 3}},
            r":3: merge method 'ties': .*density is 3",
        ),
        (
            {"merge_method": "passthrough", "slices": slices_of({"model": "a", "layer_range": [0, 9]})},
            r":5: layer_range \[0, 9\] of 'a' is out of range: .* has 4 layers$",
        ),
        (
            {"merge_method": "passthrough", "slices": [*slices_of({"model": "a", "layer_range": [0, 1]}), *slices_of({"model": "b", "layer_range": [3, 2]})]},
            r":10: layer_range \[3, 2\] of 'b' is out of range",
        ),
        (
            {"merge_method": "linear", "slices": slices_of(
                {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 1}}, {"model": "b", "layer_range": [0, 1], "parameters": {"weight": 1}}
            )},
            ":3: 'b' has 1 layers where 'a' has 2",
        ),
        (
            {"merge_method": "linear", "modules": {"default": {"models": [TWO[0], {"model": "b"}]}}},
            r":8: .* needs the parameter 'weight', .* of 'b'$",
        ),
        (
            {"merge_method": "linear", "models": [TWO[0], {"model": "b", "parameters": {"weight": 1, "normalize": True}}]},
            ":6: option 'normalize' of merge method 'linear' applies to all experts",
        ),
    ],
)  # fmt: skip
def test_mistakes_that_only_the_models_show_have_their_line_too(read: Any, content: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=f"recipe.yml{part}") as caught:
        plan_recipe(read(**content), None)
    assert "\n" not in str(caught.value)


def test_places_are_no_part_of_a_recipe(read: Any, tmp_path: Path) -> None:
    recipe = read(merge_method="linear", models=TWO)
    assert recipe == read(text="# moved\n\n" + (tmp_path / "recipe.yml").read_text())
    manifest = merge_recipe(recipe, tmp_path / "out")
    assert "recipe.yml" not in json.dumps(manifest.merged.recipe)
    assert reproduce(manifest, tmp_path / "out").same


def test_sources_of_tokens(read: Any) -> None:
    tokens = {
        "<a>": {"source": {"kind": "zero"}},
        "<b>": {"source": {"kind": "model_token", "model": "a", "token": "the"}, "force": True},
        "<c>": {"source": {"kind": "model_token", "model": {"path": "b"}, "token_id": 3}},
    }
    recipe = read(merge_method="linear", models=TWO, tokenizer={"source": "base", "tokens": tokens})
    assert recipe.tokens == {
        "<a>": TokenSource(None),
        "<b>": TokenSource("a", force=True, token="the"),
        "<c>": TokenSource("b", token=3),
    }


def test_yaml_that_is_none_is_refused_by_line(read: Any) -> None:
    with pytest.raises(UserError, match=r"recipe.yml:3: not valid YAML"):
        read(text="merge_method: linear\nmodels: [\n")


@pytest.mark.parametrize("method", ["linear", "slerp", "passthrough"])
def test_results_are_those_that_mergekit_wrote(tmp_path: Path, method: str) -> None:
    """The files in `golden` were made with mergekit 0.1.5; see its README."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    merge_recipe(read_mergekit(tmp_path / "golden" / f"{method}.yml"), tmp_path / "out")
    merged, expected = tensors_of(tmp_path / "out"), tensors_of(GOLDEN / method)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype
        if method == "slerp":
            torch.testing.assert_close(merged[name], tensor, rtol=2**-7, atol=0)
        else:
            assert torch.equal(merged[name], tensor), name


def test_parameters_that_a_method_does_not_have_are_noted_with_their_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_model(tmp_path / name, random_tensors(0))
    (tmp_path / "m.yml").write_text(
        "merge_method: linear\n"
        "models:\n"
        f"  - model: {tmp_path / 'a'}\n"
        "    parameters: {weight: 1.0, density: 0.5}\n"
        f"  - model: {tmp_path / 'b'}\n"
        "    parameters: {weight: 1.0}\n"
        "parameters: {our_own: true, lambda: 0.5}\n"
    )
    recipe = read_mergekit(tmp_path / "m.yml")
    file = tmp_path / "m.yml"
    assert recipe.notes == (
        f"{file}:4: 'linear' has no parameter 'density'; it is ignored",
        f"{file}:7: 'linear' has no parameter 'our_own'; it is ignored",
        f"{file}:7: 'linear' has no parameter 'lambda'; it is ignored",
    )
    assert set(recipe.notes) <= set(plan_recipe(recipe, None).notes)
    manifest = merge_recipe(recipe, tmp_path / "out")
    assert "notes" not in (manifest.merged.recipe or {})
    assert reproduce(manifest, tmp_path / "out").same
