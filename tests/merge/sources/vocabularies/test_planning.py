"""Planning of vocabularies: policies for different tokenizers, and rows looked up by token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from toy_tokenizers import tokenizer, vocabulary

from expertctl.core.artefacts.files import read_json
from expertctl.core.errors import UserError
from expertctl.merge.recipes.recipe import TokenSource
from expertctl.merge.sources.vocabularies.planning import plan_vocabulary


def test_the_same_tokenizer_in_another_layout_passes(tmp_path: Path) -> None:
    first, second = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b")
    content = read_json(second / "tokenizer.json")
    content["truncation"] = {"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (second / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert plan_vocabulary(vocabulary(first), {"b": vocabulary(second)}, "refuse") is None


def test_different_tokenizers_are_refused_with_both_sides_and_the_policies(tmp_path: Path) -> None:
    first, second = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b", ("<law>", "<med>"))
    with pytest.raises(UserError) as caught:
        plan_vocabulary(vocabulary(first), {"b": vocabulary(second)}, "refuse")
    size = len(vocabulary(first).tokens)
    message = str(caught.value)
    assert f"{size:,} and {size + 2:,} tokens, 2 of them different ('<law>' is missing and {size}" in message
    assert "--tokenizer base, union" in message
    with pytest.raises(UserError, match=r"no tokenizer policy .unoin. .did you mean .union."):
        plan_vocabulary(vocabulary(first), {"b": vocabulary(second)}, "unoin")


def test_padding_that_differs_is_told(tmp_path: Path) -> None:
    first, second = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b")
    with pytest.raises(UserError, match="the same tokens, but 64 and 128 embedding rows"):
        plan_vocabulary(vocabulary(first, 64), {"b": vocabulary(second, 128)}, "refuse")


def test_a_union_takes_added_rows_from_those_that_have_them(tmp_path: Path) -> None:
    """One token in one expert only, one in both with other rows and numbers."""
    a, b, c = (
        tokenizer(tmp_path / name, added) for name, added in (("a", ()), ("b", ("<law>", "<both>")), ("c", ("<both>",)))
    )
    size = len(vocabulary(a).tokens)
    plan = plan_vocabulary(vocabulary(a), {"b": vocabulary(b), "c": vocabulary(c)}, "union")
    assert plan is not None
    assert {token: entry["id"] for token, entry in plan.added.items()} == {"<law>": size, "<both>": size + 1}
    assert plan.size == size + 2
    own = {
        "a": np.zeros((size, 3), "f4"),
        "b": np.full((size + 2, 3), 2, "f4"),
        "c": np.full((size + 1, 3), 4, "f4"),
    }
    rows = plan.rearrange(own)
    for name in own:
        assert rows[name].shape == (size + 2, 3)
        np.testing.assert_array_equal(rows[name][:size], own[name][:size])
        np.testing.assert_array_equal(rows[name][size], [2, 2, 2])
    for name, expected in (("a", 3), ("b", 2), ("c", 4)):  # their own rows, and the mean where there is none
        np.testing.assert_array_equal(rows[name][size + 1], [expected] * 3)


def test_padding_is_used_up_before_the_embedding_grows(tmp_path: Path) -> None:
    a, b = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b", ("<law>",))
    plan = plan_vocabulary(vocabulary(a, 64), {"b": vocabulary(b, 64)}, "union")
    assert plan is not None
    assert plan.size == 64
    many = tokenizer(tmp_path / "c", tuple(f"<{number}>" for number in range(64)))
    grown = plan_vocabulary(vocabulary(a, 64), {"c": vocabulary(many, 128)}, "union")
    assert grown is not None
    assert grown.size % 64 == 0
    assert grown.size >= len(vocabulary(a).tokens) + 64


def test_base_looks_rows_up_by_token(tmp_path: Path) -> None:
    """Trained on other text: the same words under other numbers, some missing."""
    a, b = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b", text=["not to be", "the code"])
    first, second = vocabulary(a), vocabulary(b)
    plan = plan_vocabulary(first, {"b": second}, "base")
    assert plan is not None
    assert plan.size == first.rows
    own = {
        "a": np.arange(first.rows, dtype="f4")[:, None],
        "b": 1000 + np.arange(second.rows, dtype="f4")[:, None],
    }
    rows = plan.rearrange(own)
    for token, row in first.tokens.items():
        expected = 1000 + second.tokens[token] if token in second.tokens else row
        assert rows["b"][row, 0] == expected
        assert rows["a"][row, 0] == row
    with pytest.raises(UserError, match="cannot be united: they differ in their 'model'"):
        plan_vocabulary(first, {"b": second}, "union")


def test_single_tokens_may_come_from_a_model(tmp_path: Path) -> None:
    a, b = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b")
    first, second = vocabulary(a), vocabulary(b)
    row = first.tokens["the"]
    own = {"a": np.zeros((first.rows, 1), "f4"), "b": np.ones((second.rows, 1), "f4")}
    forced = plan_vocabulary(first, {"b": second}, "base", {"the": TokenSource("b", force=True)})
    assert forced is not None
    assert forced.rearrange(own)["a"][row, 0] == 1
    gentle = plan_vocabulary(first, {"b": second}, "base", {"the": TokenSource("b")})
    assert gentle is not None
    assert gentle.rearrange(own)["a"][row, 0] == 0
    with pytest.raises(UserError, match="no token 'teh'"):
        plan_vocabulary(first, {"b": second}, "base", {"teh": TokenSource("b")})


def test_a_multiple_is_padded_to(tmp_path: Path) -> None:
    a = tokenizer(tmp_path / "a")
    plan = plan_vocabulary(vocabulary(a), {}, "base", {}, 128)
    assert plan is not None
    assert plan.size == 128
    padded = plan.rearrange({"a": np.ones((vocabulary(a).rows, 2), "f4")})["a"]
    assert padded[vocabulary(a).rows :].sum() == 0
