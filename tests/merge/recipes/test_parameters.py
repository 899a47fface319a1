"""Parameters per layer and per module: gradients, filters and precedence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertctl.core.errors import UserError
from expertctl.merge.recipes.parameters import evaluate, matches, resolve

ATTENTION = "model.layers.3.self_attn.q_proj.weight"
MLP = "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("setting", "depth", "expected"),
    [
        (0.5, 0.3, 0.5),
        (True, 0.0, True),
        ("l1", 1.0, "l1"),
        ([0.0, 1.0], 0.0, 0.0),
        ([0.0, 1.0], 0.25, 0.25),
        ([0.0, 1.0], 1.0, 1.0),
        ([0.0, 0.5, 0.0], 0.5, 0.5),
        ([0.0, 0.5, 0.0], 0.75, 0.25),
        ([7], 0.4, 7),
        (["none", "l1"], 0.9, "none"),
        (["none", "l1"], 1.0, "l1"),
        ([False, True], 0.5, False),
    ],
)
def test_numbers_lie_on_a_gradient_and_words_change_in_steps(setting: Any, depth: float, expected: Any) -> None:
    assert evaluate("t", setting, MLP, depth) == expected


def test_the_first_filter_that_matches_counts() -> None:
    setting = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.9}, {"value": 0.5}]
    assert evaluate("t", setting, ATTENTION, 0.5) == 0.5
    assert evaluate("t", setting, ATTENTION, 1.0) == 1
    assert evaluate("t", setting, MLP, 0.5) == 0.9
    assert evaluate("t", setting, "lm_head.weight", 0.5) == 0.5
    assert evaluate("t", {"filter": "mlp", "value": 3}, MLP, 0.0) == 3


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        (None, True),
        ("*", True),
        ("mlp", True),
        ("q_proj", False),
        ("*.layers.[0-3].*", True),
        ("*.layers.[4-7].*", False),
    ],
)
def test_a_filter_is_a_part_of_the_name_or_a_pattern(pattern: str | None, matched: bool) -> None:
    assert matches(pattern, MLP) == matched


def test_specific_values_win_and_unmatched_filters_fall_through() -> None:
    source = {"density": [{"filter": "mlp", "value": 0.1}]}
    part = {"density": 0.2}
    whole = {"density": 0.3, "lambda": 0.7}
    assert resolve("density", (source, part, whole), MLP, 0.0) == 0.1
    assert resolve("density", (source, part, whole), ATTENTION, 0.0) == 0.2
    assert resolve("density", (source, whole), ATTENTION, 0.0) == 0.3
    assert resolve("lambda", (source, part, whole), MLP, 0.0) == 0.7
    assert resolve("epsilon", (source, part, whole), MLP, 0.0) is None


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ([], "empty list"),
        ([0.1, {"value": 1}], "mixes numbers"),
        ([{"filter": "mlp"}], "is not a condition"),
        ([{"fliter": "mlp", "value": 1}], "is not a condition"),
        ([[0, 1], [1, 0]], "list of lists"),
    ],
)
def test_settings_of_no_known_form_are_refused_by_key(setting: Any, part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        evaluate("density", setting, MLP, 0.5)
    assert "'density'" in str(caught.value)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_between_its_points(points: list[float], depth: float) -> None:
    value = evaluate("t", points, MLP, depth)
    assert min(points) - 1e-9 <= value <= max(points) + 1e-9


@given(st.floats(-10, 10), st.integers(1, 6), st.floats(0, 1))
def test_a_gradient_of_equal_points_is_that_number(value: float, count: int, depth: float) -> None:
    assert evaluate("t", [value] * count, MLP, depth) == pytest.approx(value)
