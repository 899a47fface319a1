"""Tensor plans: checks, stacked layers, options and weights per tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import Tensors, random_tensors, recipe, tensors_of, write_model

from expertctl.core.errors import UserError
from expertctl.core.hooks.merging import MergeMethod, PerExpert, TensorGroup, TensorMerge
from expertctl.merge.engine.shards import index_of, plan_shards
from expertctl.merge.planning.tensor_planner import Stack, plan_tensors
from expertctl.merge.recipes.recipe import OutputSlice, Recipe, SourceSlice
from expertctl.merge.sources.models import open_source


@dataclass(frozen=True)
class Options:
    density: PerExpert = 1.0
    lambda_: float = 1.0
    rescale: bool = False

    def __post_init__(self) -> None:
        each = self.density if isinstance(self.density, tuple) else (self.density,)
        if not all(0 <= value <= 1 for value in each):
            raise ValueError(f"density is {self.density}; it is 0 to 1")


def never(group: TensorGroup, options: Any) -> Any:
    pytest.fail("no method is called while a merge is planned")


PLAIN = TensorMerge("plain", "", merge=never, options=Options, uses_seed=False, arrays="any")
DELTAS = TensorMerge("deltas", "", merge=never, options=Options, weights="factors")
ONE = TensorMerge("one", "", merge=never, uses_seed=False, expert_count=(1, 1))


def planned(what: Recipe, method: MergeMethod = PLAIN) -> Stack:
    return plan_tensors(what, method, {name: open_source(name, path) for name, path in what.models.items()})


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, tensors: Tensors | None = None, **how: Any) -> Path:
        settings = {key: how.pop(key) for key in ("layers", "width", "rows", "dtype") if key in how}
        return write_model(tmp_path / name, random_tensors(0, **settings) if tensors is None else tensors, **how)

    return make


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    def check(what: Recipe, method: MergeMethod = PLAIN) -> str:
        with pytest.raises(UserError) as caught:
            planned(what, method)
        return str(caught.value)

    return check


# --- what does not fit ---


def test_layers_shapes_names_and_dtypes_that_differ_show_both_sides(
    model: Callable[..., Path], refused: Callable[..., str]
) -> None:
    a = model("a")
    deep = refused(recipe("plain", {"a": a, "b": model("deep", layers=3)}))
    assert deep == ("'b' has 3 layers where 'a' has 2; models of different depth cannot be merged tensor by tensor")
    wide = refused(recipe("plain", {"a": a, "b": model("wide", width=8)}))
    assert "is [6, 8] in 'b'" in wide
    assert "but [6, 4] in 'a'" in wide
    half = refused(recipe("plain", {"a": a, "b": model("half", dtype=torch.bfloat16)}))
    assert "is BF16 in 'b'" in half
    assert "but F32 in 'a'" in half
    assert "--dtype" in half
    less = random_tensors(0)
    del less["model.layers.1.mlp.up_proj.weight"]
    for models in ({"a": a, "b": model("less", less)}, {"b": a.parent / "less", "a": a}):
        missing = refused(recipe("plain", models))
        assert "tensor 'model.layers.1.mlp.up_proj.weight' is in 'a'" in missing
        assert "but not in 'b'" in missing


def test_dtypes_may_differ_if_the_output_dtype_is_given(model: Callable[..., Path]) -> None:
    models = {"a": model("a"), "b": model("b", dtype=torch.bfloat16)}
    assert {tensor.dtype for tensor in planned(recipe("plain", models, dtype="BF16")).tensors} == {"BF16"}


def test_buffers_that_models_calculate_anew_may_be_missing(model: Callable[..., Path]) -> None:
    old = {**random_tensors(0), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    for models in ({"a": model("a"), "b": model("b", old)}, {"b": model("c", old), "a": model("d")}):
        stack = planned(recipe("plain", models))
        assert {tensor.name for tensor in stack.tensors} == set(random_tensors(0))


def test_a_method_names_how_many_experts_it_takes(model: Callable[..., Path], refused: Callable[..., str]) -> None:
    message = refused(recipe("one", {"a": model("a"), "b": model("b")}), ONE)
    assert message == "merge method 'one' takes 1 expert, but this merge has 2: a, b"


def test_a_method_that_needs_a_seed_says_so(model: Callable[..., Path], refused: Callable[..., str]) -> None:
    assert "has no seed; set base_model" in refused(recipe("deltas", {"a": model("a")}), DELTAS)


# --- options and weights ---


def test_options_are_resolved_for_every_tensor(model: Callable[..., Path]) -> None:
    models = {"seed": model("seed", layers=3), "a": model("a", layers=3), "b": model("b", layers=3)}
    options = {"density": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.25}], "lambda": 0.5}
    tensors = {
        tensor.name: tensor
        for tensor in planned(recipe("deltas", models, seed="seed", options=options), DELTAS).tensors
    }
    densities = {name: tensor.options.density for name, tensor in tensors.items()}
    assert [densities[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)] == [0.0, 0.5, 1.0]
    assert densities["model.layers.1.self_attn.q_proj.weight"] == 0.25
    assert densities["lm_head.weight"] == 0.25
    assert {tensor.options.lambda_ for tensor in tensors.values()} == {0.5}


def test_an_option_may_be_given_for_one_expert(model: Callable[..., Path]) -> None:
    parts = (OutputSlice((SourceSlice("a", parameters={"density": 0.3}), SourceSlice("b"))),)
    stack = planned(recipe("plain", {"a": model("a"), "b": model("b")}, slices=parts))
    assert {tensor.options.density for tensor in stack.tensors} == {(0.3, 1.0)}


def test_unknown_and_impossible_options_are_refused(model: Callable[..., Path], refused: Callable[..., str]) -> None:
    models = {"a": model("a"), "b": model("b")}
    unknown = refused(recipe("plain", models, options={"desnity": 0.5}))
    assert "merge method 'plain' has no option 'desnity' (did you mean 'density'?)" in unknown
    assert "density is 1.5; it is 0 to 1" in refused(recipe("plain", models, options={"density": 1.5}))
    assert "option lambda" in refused(recipe("plain", models, options={"lambda": "much"}))
    parts = (OutputSlice((SourceSlice("a", parameters={"lambda": 0.3}), SourceSlice("b"))),)
    assert "applies to all experts" in refused(recipe("plain", models, slices=parts))


def test_shares_sum_to_one_and_factors_stay_as_given(model: Callable[..., Path]) -> None:
    models = {"seed": model("seed"), "a": model("a"), "b": model("b")}
    given = {"a": 3, "b": [{"filter": "mlp", "value": 0}, {"value": 1}]}
    shares = {
        tensor.name: tensor.weights
        for tensor in planned(recipe("plain", {"a": models["a"], "b": models["b"]}, weights=given)).tensors
    }
    assert shares["model.layers.0.mlp.up_proj.weight"] == (1.0, 0.0)
    assert shares["lm_head.weight"] == (0.75, 0.25)
    factors = planned(recipe("deltas", models, seed="seed", weights={"a": -2.0}), DELTAS).tensors
    assert {tensor.weights for tensor in factors} == {(-2.0, 1.0)}


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ({"a": 1}, "no weight is given for b"),
        ({"a": -1, "b": 1}, "the weight of 'a' is -1"),
        ({"a": 0, "b": 0}, "sum to 0"),
        ({"a": "much", "b": 1}, "which is not a number"),
    ],
)
def test_impossible_shares_are_refused(
    model: Callable[..., Path], refused: Callable[..., str], weights: dict[str, Any], part: str
) -> None:
    assert part in refused(recipe("plain", {"a": model("a"), "b": model("b")}, weights=weights))


# --- stacking layers ---


def test_slices_stack_layers_of_any_model(model: Callable[..., Path]) -> None:
    models = {"a": model("a", layers=4), "b": model("b", layers=4)}
    parts = (
        OutputSlice((SourceSlice("a", (0, 3)),)),
        OutputSlice((SourceSlice("b", (1, 4)),)),
    )
    stack = planned(recipe("one", models, slices=parts), ONE)
    assert stack.layers == (("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3))
    sources = {tensor.name: (tensor.expert_names[0], tensor.experts[0].name) for tensor in stack.tensors}
    assert sources["model.layers.3.mlp.up_proj.weight"] == ("b", "model.layers.1.mlp.up_proj.weight")
    assert sources["model.embed_tokens.weight"][0] == "a"
    assert sources["model.norm.weight"][0] == "b"
    assert sources["lm_head.weight"][0] == "b"


@pytest.mark.parametrize("layers", [(0, 5), (3, 3), (2, 1)])
def test_impossible_layers_are_refused(
    model: Callable[..., Path], refused: Callable[..., str], layers: tuple[int, int]
) -> None:
    parts = (OutputSlice((SourceSlice("a", layers),)),)
    message = refused(recipe("one", {"a": model("a", layers=4)}, slices=parts), ONE)
    assert f"layer_range [{layers[0]}, {layers[1]}] of 'a' is out of range" in message
    assert "has 4 layers" in message


# --- output heads ---


def test_a_stored_copy_of_a_tied_head_is_left_out(model: Callable[..., Path]) -> None:
    copied = random_tensors(0)
    copied["lm_head.weight"] = copied["model.embed_tokens.weight"].clone()
    models = {
        "a": model("a", copied, tie_word_embeddings=True),
        "b": model("b", copied, tie_word_embeddings=True),
    }
    assert "lm_head.weight" not in {tensor.name for tensor in planned(recipe("plain", models)).tensors}


@pytest.mark.parametrize("order", [("tied", "own"), ("own", "tied")])
def test_a_tied_head_is_its_embedding_where_another_model_has_one_of_its_own(
    model: Callable[..., Path], order: tuple[str, str]
) -> None:
    tied = random_tensors(1)
    del tied["lm_head.weight"]
    models = {"tied": model("tied", tied), "own": model("own")}
    tensors = {
        tensor.name: tensor for tensor in planned(recipe("plain", {name: models[name] for name in order})).tensors
    }
    head = dict(zip(tensors["lm_head.weight"].expert_names, tensors["lm_head.weight"].experts, strict=True))
    assert head["tied"].name == "model.embed_tokens.weight"
    assert head["own"].name == "lm_head.weight"


# --- other people's folders ---


def test_shards_in_any_order_an_unused_shard_and_extra_metadata(model: Callable[..., Path], tmp_path: Path) -> None:
    names = list(random_tensors(0))
    model("a", shards=[names[3:], names[:3]])
    write_model(tmp_path / "other", {"junk": torch.ones(2)})
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "a" / "model-00009-of-00009.safetensors")
    stack = planned(recipe("plain", {"a": tmp_path / "a", "b": model("b")}))
    assert {tensor.name for tensor in stack.tensors} == set(names)
    assert tensors_of(tmp_path / "b").keys() == set(names)


def test_the_index_of_the_output_says_which_file_has_which_tensor(model: Callable[..., Path]) -> None:
    stack = planned(recipe("plain", {"a": model("a"), "b": model("b")}))
    shards = plan_shards(stack.tensors, 200)
    index = index_of(shards)
    assert index["metadata"] == {
        "total_parameters": sum(tensor.numel() for tensor in random_tensors(0).values()),
        "total_size": sum(tensor.numel() * 4 for tensor in random_tensors(0).values()),
    }
    assert set(index["weight_map"]) == set(random_tensors(0))
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
