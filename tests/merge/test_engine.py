"""The streaming merge and the weighted average, against a plain loop in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertctl.core.errors import UserError
from expertctl.core.safetensors_io import read_header
from expertctl.core.testing import assert_merge_ok, fresh_plugins, tensor_group
from expertctl.core.types import MergeInputs, MergeMethod, TensorGroup
from expertctl.merge.engine import merge_tensors

AVERAGE = fresh_plugins().merge_method("average")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., Tensors]:
    """Merge tensors given directly: a seed, and what each expert changed."""

    def run(
        seed: Tensors, experts: dict[str, Tensors], weights: list[float], method: Any = AVERAGE
    ) -> Tensors:
        for name, tensors in {"seed": seed, **experts}.items():
            (tmp_path / name).mkdir()
            save_file(tensors, tmp_path / name / "model.safetensors")
        inputs = MergeInputs(
            seed=tmp_path / "seed",
            experts={name: tmp_path / name for name in experts},
            weights=dict(zip(experts, weights, strict=True)),
        )
        (tmp_path / "out").mkdir()
        merge_tensors(method, inputs, None, tmp_path / "out")
        return load_file(tmp_path / "out" / "model.safetensors")

    return run


def naive_average(seed: Tensors, experts: dict[str, Tensors], weights: list[float]) -> Tensors:
    result = {}
    for name, base in seed.items():
        total = [0.0] * base.numel()
        for weight, tensors in zip(weights, experts.values(), strict=True):
            for index, value in enumerate(tensors.get(name, base).double().flatten().tolist()):
                total[index] += weight * value
        result[name] = torch.tensor(total, dtype=torch.float64).reshape(base.shape)
    return result


def random_tensors(names: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    source = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": ()}
    return {name: torch.randn(shapes[name], generator=source).to(dtype) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_average_is_the_weighted_sum_with_the_seed_where_an_expert_changed_nothing(
    merged: Callable[..., Tensors], dtype: torch.dtype
) -> None:
    seed = random_tensors("abc", 0, dtype)
    experts = {"one": random_tensors("ab", 1, dtype), "two": random_tensors("c", 2, dtype), "three": {}}
    weights = [0.5, 0.2, 0.3]
    found = merged(seed, experts, weights)
    for name, expected in naive_average(seed, experts, weights).items():
        assert found[name].dtype == dtype
        # half a unit of the dtype's last place is all that the rounding at the end may cost
        tolerance = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
        torch.testing.assert_close(found[name].double(), expected, rtol=tolerance, atol=1e-6)


def test_many_bfloat16_experts_are_summed_in_float32() -> None:
    """Summed in bfloat16, 64 shares of 1/64 of a number near 1 end far off."""
    group = tensor_group((50,), num_experts=64, dtype="bfloat16")
    found = AVERAGE.merge(group, None)
    exact = torch.stack(group.experts).double().mean(dim=0)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_weights_one_and_zero_give_that_expert(merged: Callable[..., Tensors]) -> None:
    seed, one, two = (random_tensors("abc", number) for number in range(3))
    found = merged(seed, {"one": one, "two": two}, [0.0, 1.0])
    assert all(torch.equal(found[name], two[name]) for name in seed)


def test_the_average_has_the_properties_of_a_merge() -> None:
    for num_experts in (1, 2, 5):
        assert_merge_ok(AVERAGE.merge, num_experts=num_experts)


def test_the_result_has_the_seeds_tensors_in_the_seeds_order(
    merged: Callable[..., Tensors], tmp_path: Path
) -> None:
    merged(random_tensors("abc", 0), {"one": random_tensors("a", 1)}, [1.0])
    before = read_header(tmp_path / "seed" / "model.safetensors")
    after = read_header(tmp_path / "out" / "model.safetensors")
    assert [(e.name, e.dtype, e.shape) for e in after.values()] == [
        (e.name, e.dtype, e.shape) for e in before.values()
    ]


def test_the_same_merge_gives_the_same_bytes(merged: Callable[..., Tensors], tmp_path: Path) -> None:
    seed, one = random_tensors("abc", 0), random_tensors("abc", 1)
    merged(seed, {"one": one, "two": random_tensors("b", 2)}, [0.4, 0.6])
    path = tmp_path / "out" / "model.safetensors"
    first = path.read_bytes()
    inputs = MergeInputs(
        tmp_path / "seed", {"one": tmp_path / "one", "two": tmp_path / "two"}, {"one": 0.4, "two": 0.6}
    )
    merge_tensors(AVERAGE, inputs, None, tmp_path / "out")
    assert path.read_bytes() == first


# --- integers ---


def test_integer_tensors_are_taken_from_the_seed_and_never_averaged(merged: Callable[..., Tensors]) -> None:
    seed = {"count": torch.tensor([3, 4]), "flag": torch.tensor([True]), "w": torch.zeros(2)}
    same = {"count": torch.tensor([3, 4]), "w": torch.ones(2)}
    found = merged(seed, {"one": same, "two": {"w": torch.ones(2)}}, [0.5, 0.5])
    assert found["count"].tolist() == [3, 4]
    assert found["count"].dtype == torch.int64
    assert found["flag"].tolist() == [True]
    assert found["w"].tolist() == [1, 1]


def test_integer_tensors_that_differ_are_refused_and_nothing_is_left(
    merged: Callable[..., Tensors], tmp_path: Path
) -> None:
    seed = {"a": torch.zeros(2), "count": torch.tensor([3])}
    with pytest.raises(UserError, match="integer tensor 'count' differs between the seed and expert 'two'"):
        merged(seed, {"one": {}, "two": {"count": torch.tensor([4])}}, [0.5, 0.5])
    assert list((tmp_path / "out").iterdir()) == []


# --- what methods are given and may give ---


def test_a_method_sees_every_expert_in_order_with_its_weight(merged: Callable[..., Tensors]) -> None:
    seen: list[TensorGroup] = []

    def look(group: TensorGroup, options: Any) -> torch.Tensor:
        seen.append(group)
        return group.seed

    seed = random_tensors("ab", 0)
    experts = {"z": random_tensors("a", 1), "y": random_tensors("b", 2)}
    found = merged(seed, experts, [0.9, 0.1], MergeMethod("look", "", merge=look))
    assert [group.name for group in seen] == ["a", "b"]
    for group in seen:
        assert (group.expert_names, group.weights) == (("z", "y"), (0.9, 0.1))
        expected = [experts[name].get(group.name, seed[group.name]) for name in ("z", "y")]
        assert all(torch.equal(*pair) for pair in zip(group.experts, expected, strict=True))
    assert torch.equal(found["a"], seed["a"])


def test_a_method_may_answer_in_another_dtype_and_the_seeds_is_written(
    merged: Callable[..., Tensors],
) -> None:
    method = MergeMethod("up", "", merge=lambda group, options: group.seed.double() + 1)
    found = merged(random_tensors("a", 0, torch.bfloat16), {"one": {}}, [1.0], method)
    assert found["a"].dtype == torch.bfloat16


def test_a_method_that_changes_a_shape_is_named_and_nothing_is_left(
    merged: Callable[..., Tensors], tmp_path: Path
) -> None:
    method = MergeMethod("bad", "", merge=lambda group, options: group.seed[:1])
    with pytest.raises(UserError, match=r"merge method 'bad' made 'a' \[1, 4\]; the seed's is \[3, 4\]"):
        merged(random_tensors("a", 0), {"one": {}}, [1.0], method)
    assert list((tmp_path / "out").iterdir()) == []


def test_tensors_that_do_not_fit_the_seed_are_refused_before_the_method_is_called(
    merged: Callable[..., Tensors],
) -> None:
    method = MergeMethod("never", "", merge=lambda group, options: pytest.fail("called"))
    with pytest.raises(UserError, match=r"tensor 'a' is F32 \[2\] in .*, but F32 \[3, 4\] in the seed"):
        merged(random_tensors("ab", 0), {"one": {"a": torch.ones(2)}}, [1.0], method)
