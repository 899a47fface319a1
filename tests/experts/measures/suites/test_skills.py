"""Skills alone and in pairs: which pairs are at their weaker skill."""

from __future__ import annotations

import numpy as np
import pytest

from expertctl.experts.measures.suites.skills import SkillTable, skill_table

Tags = list[tuple[str, ...]]


def table(counts: dict[tuple[str, ...], tuple[int, int]]) -> SkillTable:
    """Return the table of (right, asked) by tags, in shuffled order."""
    rows = [(tags, float(number < right)) for tags, (right, asked) in counts.items() for number in range(asked)]
    order = np.random.default_rng(0).permutation(len(rows))
    made = skill_table([rows[place][0] for place in order], [rows[place][1] for place in order])
    assert made is not None
    return made


def test_scores_are_those_of_questions_with_just_these_tags() -> None:
    made = table({("code",): (90, 100), ("law",): (30, 100), ("code", "law"): (35, 100), (): (1, 2)})
    assert [(skill.name, skill.questions, skill.score.value) for skill in made.skills] == [
        ("code", 100, 0.9),
        ("law", 100, 0.3),
    ]
    (pair,) = made.pairs
    assert (pair.names, pair.questions, pair.score.value) == (("code", "law"), 100, 0.35)
    assert pair.weaker == "law"
    assert pair.above_weaker is not None
    assert pair.above_weaker.value == pytest.approx(0.05)
    assert pair.place == pytest.approx(0.05 / 0.6)
    assert pair.at_weaker == "yes"
    assert made.untagged == 2


@pytest.mark.parametrize(("right", "verdict"), [(10, "yes"), (30, "yes"), (60, "unclear"), (85, "no"), (100, "no")])
def test_the_verdict_is_clear_only_if_the_interval_is(right: int, verdict: str) -> None:
    (pair,) = table({("a",): (90, 100), ("b",): (30, 100), ("a", "b"): (right, 100)}).pairs
    assert pair.at_weaker == verdict


def test_few_questions_are_unclear() -> None:
    (pair,) = table({("a",): (3, 4), ("b",): (1, 4), ("a", "b"): (1, 4)}).pairs
    assert pair.at_weaker == "unclear"


def test_the_interval_of_a_pair_is_that_of_three_independent_groups() -> None:
    (pair,) = table({("a",): (360, 400), ("b",): (120, 400), ("a", "b"): (140, 400)}).pairs
    assert pair.above_weaker is not None
    error = np.sqrt(0.3 * 0.7 / 400 + 0.35 * 0.65 / 400)
    assert pair.above_weaker.high - pair.above_weaker.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_a_pair_without_its_skills_alone_has_no_verdict() -> None:
    made = table({("a",): (1, 2), ("a", "b"): (1, 2)})
    (pair,) = made.pairs
    assert (pair.weaker, pair.above_weaker, pair.at_weaker, pair.place) == (None, None, None, None)
    assert made.as_json()["pairs"][0]["at_weaker"] is None


def test_equal_skills_have_no_place_between_them() -> None:
    (pair,) = table({("a",): (5, 10), ("b",): (5, 10), ("a", "b"): (5, 10)}).pairs
    assert (pair.place, pair.weaker) == (None, "a")


def test_without_tags_there_is_no_table() -> None:
    assert skill_table([(), ()], [1.0, 0.0]) is None
