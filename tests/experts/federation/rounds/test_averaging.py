"""Averaging and the outer step against torch.optim.SGD in float64, and refusal of invalid weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertctl import UserError
from expertctl.core.artefacts import safetensors_io
from expertctl.core.artefacts.safetensors_io import Checkpoint, write_tensors
from expertctl.experts.federation.judging.refusal import Refusal, RefusalCode
from expertctl.experts.federation.judging.round_weights import AveragingRules, Delivery, examine_delivery
from expertctl.experts.federation.rounds.averaging import (
    OUTER_RECIPES,
    Contribution,
    OuterRecipe,
    average_round,
    outer_recipe,
    owner_shares,
)

RULES = AveragingRules()
Tensors = dict[str, torch.Tensor]


def shared_weights(dtype: torch.dtype, seed: int = 0) -> Tensors:
    source = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (6, 4), "norm.weight": (4,), "scale": ()}
    floating = {
        name: torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }
    return {**floating, "positions": torch.arange(5)}


def moved(weights: Mapping[str, torch.Tensor], seed: int, scale: float = 0.05) -> Tensors:
    """Return weights as after an owner's training."""
    source = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.double() + scale * torch.randn(tensor.shape, generator=source, dtype=torch.float64)).to(
            tensor.dtype
        )
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in weights.items()
    }


def contribution(folder: Path, owner: str, tensors: Tensors, share: float, shared: Path) -> Contribution:
    file = folder / f"{owner}.safetensors"
    write_tensors(file, tensors)
    examined = examine_delivery(file, 1.0, Checkpoint([shared]), RULES)
    assert isinstance(examined, Delivery), examined
    return Contribution(owner, file, examined.digest, share)


def rounds_on_disk(folder: Path, dtype: torch.dtype, recipe: str, count: int) -> tuple[Checkpoint, list]:
    """Run rounds through files; return the last state and every round's (shared, owners) as they were read."""
    shared, state, history = folder / "shared-0.safetensors", None, []
    write_tensors(shared, shared_weights(dtype))
    for number in range(count):
        tensors = {name: Checkpoint([shared]).read(name) for name in Checkpoint([shared])}
        owners = [moved(tensors, 10 * number + owner) for owner in range(3)]
        history.append((tensors, owners))
        given = [
            contribution(folder, f"owner-{index}", owner, (0.2, 0.3, 0.5)[index], shared)
            for index, owner in enumerate(owners)
        ]
        after, outer = folder / f"shared-{number + 1}.safetensors", folder / f"outer-{number}.safetensors"
        average_round(Checkpoint([shared]), given, state, OUTER_RECIPES[recipe], after, outer)
        shared, state = after, Checkpoint([outer])
    return Checkpoint([shared]), [*history, state]


@pytest.mark.parametrize("recipe", ["diloco", "fedavg"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_rounds_equal_torch_sgd_in_float64(tmp_path: Path, recipe: str, dtype: torch.dtype, tolerance: float) -> None:
    last, (*history, state) = rounds_on_disk(tmp_path, dtype, recipe, 5)
    settings = OUTER_RECIPES[recipe]
    for name, first in history[0][0].items():
        if not first.is_floating_point():
            assert torch.equal(last.read(name), first)
            continue
        parameter = torch.nn.Parameter(first.double())
        optimiser = torch.optim.SGD(
            [parameter],
            lr=settings.learning_rate,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
        )
        for sent, owners in history:
            parameter.grad = sum(
                share * (sent[name].double() - owner[name].double())
                for share, owner in zip((0.2, 0.3, 0.5), owners, strict=True)
            )
            optimiser.step()
        stored = last.read(name)
        assert stored.dtype == dtype
        exact = state.read(f"master/{name}") if dtype == torch.bfloat16 else stored
        torch.testing.assert_close(exact.double(), parameter.data, atol=tolerance, rtol=tolerance)
        assert torch.equal(stored, exact.to(dtype))


def test_a_recipes_outer_optimiser_can_be_changed() -> None:
    rules = AveragingRules(learning_rate=0.3, momentum=0.0)
    assert outer_recipe("diloco", rules) == OuterRecipe("diloco", 0.3, 0.0, by_tokens=False)
    assert outer_recipe("diloco", AveragingRules()) == outer_recipe("diloco") == OUTER_RECIPES["diloco"]
    for wrong in ({"learning_rate": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"max_change": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AveragingRules(**wrong)


def test_fedavg_is_the_weighted_mean_of_the_owners(tmp_path: Path) -> None:
    last, (*history, _) = rounds_on_disk(tmp_path, torch.float64, "fedavg", 1)
    _, owners = history[0]
    mean = sum(share * owner["embed.weight"] for share, owner in zip((0.2, 0.3, 0.5), owners, strict=True))
    torch.testing.assert_close(last.read("embed.weight"), mean, atol=1e-14, rtol=1e-14)


def test_small_steps_are_not_lost_to_bfloat16(tmp_path: Path) -> None:
    """Sixteen steps, each too small for bfloat16, move a weight."""
    shared, state = tmp_path / "shared.safetensors", None
    write_tensors(shared, {"w": torch.ones(4, dtype=torch.bfloat16)})
    recipe = OUTER_RECIPES["fedavg"]
    for number in range(16):
        tensors = {"w": Checkpoint([shared]).read("w")}
        step = torch.tensor([2.0**-7, 0, 0, 0])
        owners = [
            contribution(tmp_path, "still", tensors, 0.875, shared),
            contribution(tmp_path, "one", {"w": (tensors["w"].float() + step).bfloat16()}, 0.125, shared),
        ]
        after, outer = tmp_path / f"{number}.safetensors", tmp_path / f"outer-{number}.safetensors"
        average_round(Checkpoint([shared]), owners, state, recipe, after, outer)
        shared, state = after, Checkpoint([outer])
    assert float(Checkpoint([shared]).read("w")[0]) == pytest.approx(1.0 + 2.0**-6, abs=2.0**-7)
    assert float(Checkpoint([shared]).read("w")[1]) == 1.0


def damaged(kind: str, tensors: Tensors) -> Tensors:
    weight = tensors["embed.weight"]
    if kind == "keys":
        return {name: tensor for name, tensor in tensors.items() if name != "scale"}
    if kind == "more keys":
        return {**tensors, "extra": torch.zeros(2)}
    if kind == "shape":
        return {**tensors, "embed.weight": weight.T.contiguous()}
    if kind == "dtype":
        return {**tensors, "embed.weight": weight.double()}
    if kind == "nan":
        weight[0, 0] = float("nan")
    elif kind == "infinite":
        weight[0, 0] = float("inf")
    elif kind == "scaled":
        return {**tensors, "embed.weight": 10 * weight}
    else:
        tensors["positions"][0] = 7
    return tensors


@pytest.mark.parametrize(
    ("kind", "code", "detail"),
    [
        ("keys", RefusalCode.SHAPES, "the owner's weights lack 'scale'"),
        ("more keys", RefusalCode.SHAPES, "the shared model has no 'extra'"),
        ("shape", RefusalCode.SHAPES, r"'embed.weight' is [4, 6], the shared tensor [6, 4]"),
        ("dtype", RefusalCode.DTYPES, "'embed.weight' is F64, the shared tensor F32"),
        ("nan", RefusalCode.NOT_FINITE, "'embed.weight'"),
        ("infinite", RefusalCode.NOT_FINITE, "'embed.weight'"),
        ("scaled", RefusalCode.NORM, "times the norm of the shared weights; 1 is allowed"),
        ("integers", RefusalCode.FROZEN, "'positions' is not a floating-point tensor"),
    ],
)
def test_weights_that_cannot_be_averaged_are_refused(tmp_path: Path, kind: str, code: RefusalCode, detail: str) -> None:
    shared, own = tmp_path / "shared.safetensors", tmp_path / "own.safetensors"
    write_tensors(shared, shared_weights(torch.float32))
    write_tensors(own, damaged(kind, moved(shared_weights(torch.float32), 1)))
    examined = examine_delivery(own, 1.0, Checkpoint([shared]), RULES)
    assert isinstance(examined, Refusal)
    assert examined.code is code
    assert detail in examined.detail


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared.safetensors", tmp_path / "own.safetensors"
    write_tensors(shared, shared_weights(torch.float32))
    own.write_bytes(shared.read_bytes()[:-3])
    examined = examine_delivery(own, 1.0, Checkpoint([shared]), RULES)
    assert isinstance(examined, Refusal)
    assert examined.code is RefusalCode.FILES
    assert str(tmp_path) not in str(examined)


def test_weights_changed_after_the_examination_stop_the_round(tmp_path: Path) -> None:
    shared = tmp_path / "shared.safetensors"
    write_tensors(shared, shared_weights(torch.float32))
    given = contribution(tmp_path, "one", moved(shared_weights(torch.float32), 1), 1.0, shared)
    write_tensors(given.file, moved(shared_weights(torch.float32), 2))
    after, outer = tmp_path / "after.safetensors", tmp_path / "outer.safetensors"
    with pytest.raises(UserError, match=r"the weights of 'one' .* have changed since they were examined"):
        average_round(Checkpoint([shared]), [given], None, OUTER_RECIPES["diloco"], after, outer)
    assert not after.exists()
    assert not outer.exists()


def test_the_order_of_owners_does_not_change_a_byte(tmp_path: Path) -> None:
    shared = tmp_path / "shared.safetensors"
    write_tensors(shared, shared_weights(torch.bfloat16))
    given = [
        contribution(tmp_path, f"owner-{index}", moved(shared_weights(torch.bfloat16), index), 0.25, shared)
        for index in range(4)
    ]
    written = []
    for order in (given, given[::-1]):
        files = tmp_path / "after.safetensors", tmp_path / "outer.safetensors"
        average_round(Checkpoint([shared]), order, None, OUTER_RECIPES["diloco"], *files)
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pieces_of_any_size_give_the_same_bytes(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared.safetensors"
    write_tensors(shared, shared_weights(dtype))
    given = [contribution(tmp_path, str(index), moved(shared_weights(dtype), index), 0.5, shared) for index in range(2)]
    written = []
    for piece in (1 << 22, 5, 1):
        monkeypatch.setattr(safetensors_io, "SPAN", piece)
        examined = examine_delivery(given[0].file, 1.0, Checkpoint([shared]), RULES)
        assert isinstance(examined, Delivery)
        assert examined.digest == given[0].digest
        files = [tmp_path / f"{name}-{piece}.safetensors" for name in ("first", "outer", "second", "last")]
        average_round(Checkpoint([shared]), given, None, OUTER_RECIPES["diloco"], files[0], files[1])
        state = Checkpoint([files[1]])
        average_round(Checkpoint([files[0]]), given, state, OUTER_RECIPES["diloco"], files[2], files[3])
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1] == written[2]


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(UserError, match=r"no synchronous recipe 'dilco' .did you mean 'diloco'"):
        outer_recipe("dilco")


def deliveries(weights: dict[str, float], late: dict[str, int] | None = None) -> dict[str, Delivery]:
    return {owner: Delivery(owner, weight, 0.1, late=(late or {}).get(owner, 0)) for owner, weight in weights.items()}


@given(st.dictionaries(st.text("abcdef", min_size=1), st.floats(1e-3, 1e9), min_size=1, max_size=8))
def test_shares_sum_to_one_and_a_false_count_cannot_dominate(weights: dict[str, float]) -> None:
    equal = owner_shares(deliveries(weights), OUTER_RECIPES["diloco"], RULES)
    assert set(equal.values()) == {1 / len(weights)}
    by_tokens = owner_shares(deliveries(weights), OUTER_RECIPES["fedavg"], RULES)
    assert sum(by_tokens.values()) == pytest.approx(1.0)
    assert list(by_tokens) == sorted(weights)
    largest = {**weights, "liar": 1e30}
    if len(weights) >= 3:
        assert owner_shares(deliveries(largest), OUTER_RECIPES["fedavg"], RULES)["liar"] < 1.0


def test_an_excessive_token_count_is_capped_at_ten_medians() -> None:
    shares = owner_shares(deliveries({"a": 1.0, "b": 1.0, "liar": 1e12}), OUTER_RECIPES["fedavg"], RULES)
    assert shares == pytest.approx({"a": 1 / 12, "b": 1 / 12, "liar": 10 / 12})


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.floats(0, 1))
def test_a_late_delivery_loses_the_discount_for_each_round_and_others_gain_nothing(
    late: list[int], discount: float
) -> None:
    names = [f"owner-{index}" for index in range(len(late))]
    given = deliveries(dict.fromkeys(names, 1.0), dict(zip(names, late, strict=True)))
    shares = owner_shares(given, OUTER_RECIPES["diloco"], AveragingRules(late_discount=discount))
    assert shares == pytest.approx(
        {name: discount**rounds / len(late) for name, rounds in zip(names, late, strict=True)}
    )


def test_a_late_contribution_adds_its_change_from_where_it_started(tmp_path: Path) -> None:
    """A naive float64 sum over the owners, one of whom started from other weights."""
    now, before = shared_weights(torch.float32), moved(shared_weights(torch.float32), 7)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("now", "before", "weights", "outer")}
    write_tensors(files["now"], now)
    write_tensors(files["before"], before)
    models = {"on-time": moved(now, 1), "late": moved(before, 2)}
    given = [
        contribution(tmp_path, "on-time", models["on-time"], 0.5, files["now"]),
        replace(contribution(tmp_path, "late", models["late"], 0.25, files["before"]), start=files["before"]),
    ]
    average_round(Checkpoint([files["now"]]), given, None, OUTER_RECIPES["fedavg"], files["weights"], files["outer"])
    after = Checkpoint([files["weights"]])
    for name, start in now.items():
        if start.is_floating_point():
            change = 0.5 * (models["on-time"][name].double() - start.double())
            change += 0.25 * (models["late"][name].double() - before[name].double())
            torch.testing.assert_close(after.read(name).double(), start.double() + change, atol=1e-6, rtol=0)
