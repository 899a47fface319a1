"""The streaming engine, compared with plain loops in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import Tensors, engine_merge, random_tensors, recipe, tensors_of, write_model

from expertctl.core.artefacts.safetensors_io import Checkpoint, read_header
from expertctl.core.errors import UserError
from expertctl.core.hooks.merging import MergeMethod, TensorGroup, TensorMerge
from expertctl.merge.engine.calculator import EngineSettings

LINE = "model.layers.1.mlp.up_proj.weight"


def mean(group: TensorGroup, options: Any) -> Any:
    total = group.experts[0] * group.weights[0]
    for weight, expert in zip(group.weights[1:], group.experts[1:], strict=True):
        total = total + weight * expert
    return total


MEAN = TensorMerge("mean", "", merge=mean, uses_seed=False, elementwise=True, arrays="any")
WHOLE = TensorMerge("mean", "", merge=mean, uses_seed=False, arrays="any")
IN_TORCH = TensorMerge("mean", "", merge=mean, uses_seed=False)


def folders(root: Path, count: int, **how: Any) -> dict[str, Path]:
    return {f"m{number}": write_model(root / f"m{number}", random_tensors(number, **how)) for number in range(count)}


def naive_mean(models: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    return {
        name: sum(weight * model[name].double() for weight, model in zip(weights, models, strict=True))
        for name in models[0]
    }


@pytest.mark.parametrize("method", [MEAN, WHOLE, IN_TORCH], ids=["pieces", "whole", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_weighted_mean_equals_a_plain_loop(tmp_path: Path, dtype: torch.dtype, method: MergeMethod) -> None:
    models = folders(tmp_path, 3, dtype=dtype)
    weights = {"m0": 5, "m1": 2, "m2": 3}
    engine_merge(recipe("mean", models, weights=weights), tmp_path / "out", method=method)
    merged = tensors_of(tmp_path / "out")
    expected = naive_mean([tensors_of(folder) for folder in models.values()], [0.5, 0.2, 0.3])
    assert merged.keys() == expected.keys()
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    for name, tensor in expected.items():
        assert merged[name].dtype == dtype
        torch.testing.assert_close(merged[name].double(), tensor, rtol=tolerance, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(
    threads=st.integers(1, 4),
    shard_bytes=st.integers(1, 600),
    method=st.sampled_from([MEAN, WHOLE, IN_TORCH]),
)
def test_threads_shards_and_pieces_change_no_byte(
    tmp_path_factory: pytest.TempPathFactory, threads: int, shard_bytes: int, method: MergeMethod
) -> None:
    root = tmp_path_factory.mktemp("models")
    models = folders(root, 3, dtype=torch.bfloat16)
    what = recipe("mean", models, weights={"m0": 1, "m1": 2, "m2": 3})
    plain = engine_merge(what, root / "plain", method=WHOLE, threads=1)
    cut = engine_merge(what, root / "cut", method=method, threads=threads, shard_bytes=shard_bytes, pieces=3)
    assert cut.digests == plain.digests
    assert all(Checkpoint([file]) for file in (root / "cut").glob("*.safetensors"))


def test_a_big_tensor_gets_a_shard_of_its_own_and_the_index_names_every_file(tmp_path: Path) -> None:
    models = folders(tmp_path, 2, rows=50)
    engine_merge(recipe("mean", models), tmp_path / "out", method=MEAN, shard_bytes=400)
    checkpoint = Checkpoint.of_folder(tmp_path / "out")
    assert set(checkpoint) == set(random_tensors(0, rows=50))
    by_file: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        by_file[entry.file.name] = by_file.get(entry.file.name, 0) + entry.num_bytes
    big = {checkpoint.entry(name).file.name for name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert all(size <= 400 for file, size in by_file.items() if file not in big)
    assert sorted(by_file) == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))


def test_digests_of_what_is_read_and_written_are_those_of_the_files(tmp_path: Path) -> None:
    models = folders(tmp_path, 2)
    written = engine_merge(recipe("mean", models), tmp_path / "out", method=MEAN)
    assert written.digests == Checkpoint.of_folder(tmp_path / "out").digests()
    for folder in models.values():
        checkpoint = Checkpoint.of_folder(folder)
        assert {entry.name: written.read[entry] for entry in checkpoint.entries.values()} == checkpoint.digests()


def test_tensors_of_mixed_widths_are_aligned(tmp_path: Path) -> None:
    odd = {**random_tensors(0, dtype=torch.bfloat16), "a": torch.ones(3, dtype=torch.bfloat16)}
    odd["b"] = torch.ones(2, dtype=torch.float32)
    odd["c"] = torch.tensor([7], dtype=torch.int64)
    odd["d"] = torch.tensor([True, False, True])
    models = {name: write_model(tmp_path / name, odd) for name in ("x", "y")}
    engine_merge(recipe("mean", models), tmp_path / "out", method=MEAN)
    header_bytes = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    for entry in read_header(tmp_path / "out" / "model.safetensors").values():
        width = {"BF16": 2, "F32": 4, "I64": 8, "BOOL": 1}[entry.dtype]
        assert (entry.begin - 8 - header_bytes) % width == 0
    assert all(torch.equal(tensor, odd[name]) for name, tensor in tensors_of(tmp_path / "out").items())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_the_asked_dtype_is_written_rounded_once(tmp_path: Path, dtype: str) -> None:
    models = folders(tmp_path, 2)
    engine_merge(recipe("mean", models, dtype=dtype), tmp_path / "out", method=MEAN)
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[dtype]
    first, second = (tensors_of(folder) for folder in models.values())
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, (first[name] * 0.5 + 0.5 * second[name]).to(kind))


def test_inputs_are_rounded_first_where_the_recipe_says_so(tmp_path: Path) -> None:
    models = folders(tmp_path, 2)
    what = recipe("mean", models, input_dtype="BF16", dtype="F32")
    engine_merge(what, tmp_path / "out", method=MEAN)
    first, second = (tensors_of(folder) for folder in models.values())
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, first[name].bfloat16().float() * 0.5 + 0.5 * second[name].bfloat16().float())


def test_eight_bit_floats_are_merged_too(tmp_path: Path) -> None:
    values = {"a": torch.tensor([0.5, -448.0, 2.0, 0.0]).to(torch.float8_e4m3fn)}
    models = {name: write_model(tmp_path / name, values) for name in ("x", "y")}
    engine_merge(recipe("mean", models), tmp_path / "out", method=MEAN)
    assert torch.equal(tensors_of(tmp_path / "out")["a"].float(), values["a"].float())


# --- what is copied, and what is never averaged ---


def test_tensors_that_no_expert_changed_are_copied_without_the_method(tmp_path: Path) -> None:
    from expertctl.merge.engine.calculator import run_merge
    from expertctl.merge.engine.shards import plan_shards
    from expertctl.merge.planning.tensor_planner import plan_tensors
    from expertctl.merge.sources.models import open_source

    seed = open_source("seed", write_model(tmp_path / "seed", random_tensors(0)))
    changed = open_source("x", write_model(tmp_path / "x", random_tensors(1))).tensors[LINE]
    expert: Any = SimpleNamespace(folder=seed.folder, config=seed.config, tensors={**seed.tensors, LINE: changed})
    asked: list[str] = []

    def look(group: TensorGroup, options: Any) -> Any:
        asked.append(group.name)
        return group.experts[0]

    method = TensorMerge("look", "", merge=look, arrays="any")
    what = recipe("look", {"seed": seed.folder, "law": seed.folder}, seed="seed")
    stack = plan_tensors(what, method, {"seed": seed, "law": expert})
    (tmp_path / "out").mkdir()
    run_merge(method, plan_shards(stack.tensors), tmp_path / "out", fingerprint="x")
    assert asked == [LINE]
    merged, origin = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "seed")
    assert all(torch.equal(merged[name], origin[name]) for name in origin if name != LINE)
    assert torch.equal(merged[LINE], tensors_of(tmp_path / "x")[LINE])


def test_integers_that_agree_are_copied_and_those_that_differ_are_refused(tmp_path: Path) -> None:
    counted = {**random_tensors(0), "count": torch.tensor([3, 4])}
    other = {**random_tensors(1), "count": torch.tensor([3, 4])}
    models = {"x": write_model(tmp_path / "x", counted), "y": write_model(tmp_path / "y", other)}
    engine_merge(recipe("mean", models), tmp_path / "out", method=MEAN)
    assert tensors_of(tmp_path / "out")["count"].tolist() == [3, 4]
    models["y"] = write_model(tmp_path / "z", {**other, "count": torch.tensor([3, 5])})
    with pytest.raises(UserError, match="tensor 'count' has dtype I64, which cannot be averaged, but differs"):
        engine_merge(recipe("mean", models), tmp_path / "two", method=MEAN)


# --- what methods are given and may give ---


@pytest.mark.parametrize("method", [MEAN, IN_TORCH], ids=["numpy", "torch"])
def test_a_method_sees_float32_of_every_expert_in_order_with_its_weight(tmp_path: Path, method: MergeMethod) -> None:
    seen: list[TensorGroup] = []

    def look(group: TensorGroup, options: Any) -> Any:
        seen.append(group)
        return mean(group, options)

    from dataclasses import replace

    models = folders(tmp_path, 2, dtype=torch.bfloat16)
    what = recipe("mean", {"m1": models["m1"], "m0": models["m0"]}, weights={"m0": 1, "m1": 9})
    engine_merge(what, tmp_path / "out", method=replace(method, merge=look, elementwise=False), threads=1)
    kind: Any = np.float32 if method is MEAN else torch.float32
    values = {name: tensors_of(folder) for name, folder in models.items()}
    assert {group.name for group in seen} == set(values["m0"])
    for group in seen:
        assert (group.expert_names, group.weights) == (("m1", "m0"), (0.9, 0.1))
        assert all(expert.dtype == kind for expert in group.experts)
        for name, expert in zip(group.expert_names, group.experts, strict=True):
            assert torch.equal(torch.as_tensor(expert), values[name][group.name].float())


def test_a_method_without_seed_says_so_when_it_asks_for_it(tmp_path: Path) -> None:
    greedy = TensorMerge("greedy", "", merge=lambda group, options: group.seed, uses_seed=False)
    with pytest.raises(ValueError, match="declares uses_seed=False"):
        engine_merge(recipe("greedy", folders(tmp_path, 2)), tmp_path / "out", method=greedy)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_method_that_changes_a_shape_is_named(tmp_path: Path, threads: int) -> None:
    bad = TensorMerge("bad", "", merge=lambda group, options: group.experts[0][:1], uses_seed=False)
    with pytest.raises(UserError, match=r"merge method 'bad' returned shape \[1(, 4)?\] for tensor '.*'; expected \["):
        engine_merge(recipe("bad", folders(tmp_path, 2)), tmp_path / "out", method=bad, threads=threads)


def test_an_error_in_a_method_stops_all_threads_and_keeps_its_traceback(tmp_path: Path) -> None:
    def fails(group: TensorGroup, options: Any) -> Any:
        raise ZeroDivisionError("a bug")

    broken = TensorMerge("broken", "", merge=fails, uses_seed=False)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        engine_merge(recipe("broken", folders(tmp_path, 2, layers=20)), tmp_path / "out", method=broken)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    from expertctl.merge.engine.reading import Reader
    from expertctl.merge.sources.models import open_source

    source = open_source("x", write_model(tmp_path / "x", random_tensors(0)))
    path = tmp_path / "x" / "model.safetensors"
    last = max(source.tensors.values(), key=lambda tensor: tensor.entry.end)
    path.write_bytes(path.read_bytes()[:-40])
    with Reader() as reader, pytest.raises(UserError, match="ends within tensor"):
        reader.read(last)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [False, True], ids=["merged", "copied"])
def test_an_input_that_is_not_finite_is_named(tmp_path: Path, value: float, dtype: torch.dtype, shared: bool) -> None:
    tensors = {name: random_tensors(number, dtype=dtype) for number, name in enumerate(("x", "y"))}
    broken = "model.layers.1.mlp.up_proj.weight"
    tensors["y"][broken][3, 2] = value
    if shared:
        tensors["x"][broken] = tensors["y"][broken].clone()
    models = {name: write_model(tmp_path / name, each) for name, each in tensors.items()}
    with pytest.raises(UserError, match=rf"tensor '{broken}' contains NaN or infinity") as caught:
        engine_merge(recipe("mean", models), tmp_path / "out", method=MEAN)
    named = [name for name, folder in models.items() if str(folder / "model.safetensors") in str(caught.value)]
    assert named == ["x" if shared else "y"]
    insisted = EngineSettings(allow_nonfinite=True)
    engine_merge(recipe("mean", models), tmp_path / "insisted", method=MEAN, settings=insisted)
    assert not torch.isfinite(tensors_of(tmp_path / "insisted")[broken]).all()
