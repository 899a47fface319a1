"""Causal masking: blocks against a naive reference, and the tokens that a seed has for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversations import make_chat_project
from hypothesis import given
from hypothesis import strategies as st
from inline_launching import inline_launching
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertctl import Row, UserError, Workspace
from expertctl.plugins.basics.infilling import END, MASK, Infilling, InfillOptions, moved, suffix_first

MASKS, END_ID, SEPARATOR = (90, 91, 92), 93, 0
TOKENS = [MASK.format(0), MASK.format(1), END]
texts = st.lists(st.integers(0, 80), min_size=24, max_size=60)


def naive(text: list[int], spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Return a text with spans behind it, one token after the other."""
    tokens, behind = [], []
    for place, token in enumerate([*text, None]):
        for number, (begin, end) in enumerate(spans):
            if place == begin:
                tokens.append(MASKS[number])
                behind += [MASKS[number], *text[begin:end], END_ID]
        if token is not None and not any(begin <= place < end for begin, end in spans):
            tokens.append(token)
    tokens += behind
    return tokens, [token not in MASKS for token in tokens]


@given(texts, st.integers(0, 2**32), st.floats(0.1, 4))
def test_a_block_is_the_naive_one_of_its_spans(text: list[int], seed: int, rate: float) -> None:
    objective = Infilling(MASKS, END_ID, SEPARATOR, rate)
    row = objective.row(Row(np.array(text)), np.random.default_rng(seed))
    again = objective.row(Row(np.array(text)), np.random.default_rng(seed))
    assert row.tokens.tolist() == again.tokens.tolist()
    assert len(row.tokens) == len(text)
    number = row.tokens.tolist().count(END_ID)
    used = text[: len(text) - 3 * number]
    first = [row.tokens.tolist().index(mask) for mask in MASKS[:number]]
    spans, shift = [], 0
    rest = row.tokens.tolist()[len(used) - sum(_lengths(row.tokens.tolist(), number)) + number :]
    for place, length in zip(first, _lengths(row.tokens.tolist(), number), strict=True):
        begin = place + shift
        spans.append((begin, begin + length))
        shift += length - 1
    expected, counted = naive(used, spans)
    assert row.tokens.tolist() == expected
    assert rest[: 1 if number else 0] == [MASKS[0]][: 1 if number else 0]
    if number:
        assert row.counted is not None
        assert row.counted.tolist() == counted
        assert counted.count(False) == 2 * number
    else:
        assert row.counted is None
    for begin, end in spans:
        assert begin > 0, "the first token is only context"
        assert SEPARATOR not in used[begin:end], "a span lies in one document"


def _lengths(tokens: list[int], number: int) -> list[int]:
    """Return the lengths of the spans at the end of a block."""
    lengths, end = [], len(tokens)
    for mask in reversed(MASKS[:number]):
        begin = len(tokens) - 1 - tokens[::-1].index(mask)
        lengths.append(end - begin - 2)
        end = begin
    return lengths[::-1]


def test_spans_and_the_number_of_masks() -> None:
    row = moved(np.arange(1, 9), [(1, 3), (5, 6)], MASKS, END_ID)
    assert row.tokens.tolist() == [1, 90, 4, 5, 91, 7, 8, 90, 2, 3, 93, 91, 6, 93]
    assert row.counted is not None
    assert row.counted.tolist() == [token not in MASKS for token in row.tokens.tolist()]
    counts = []
    objective = Infilling(MASKS[:2], END_ID, SEPARATOR, 1.0)
    for seed in range(400):
        counts.append(objective.row(Row(np.arange(1, 60)), np.random.default_rng(seed)).tokens.tolist().count(END_ID))
    assert 0.3 < counts.count(0) / 400 < 0.45, "e^-1 of a Poisson distribution of rate 1"
    assert max(counts) == 2


@given(texts, st.integers(0, 2**32))
def test_with_the_suffix_first_a_span_follows_the_text_before_it(text: list[int], seed: int) -> None:
    blocks = [
        Infilling(MASKS[:1], END_ID, SEPARATOR, 2.0, order).row(Row(np.array(text)), np.random.default_rng(seed))
        for order in (moved, suffix_first)
    ]
    one, other = (block.tokens.tolist() for block in blocks)
    if END_ID not in one:
        assert one == other == text
        return
    before, rest = one[: one.index(MASKS[0])], one[one.index(MASKS[0]) + 1 :]
    behind, span = rest[: rest.index(MASKS[0])], rest[rest.index(MASKS[0]) + 1 : -1]
    assert other == [MASKS[0], *behind, MASKS[0], *before, *span, END_ID]
    assert blocks[1].counted is not None
    assert blocks[1].counted.tolist() == [token not in MASKS for token in other]


def test_with_the_suffix_first_there_is_one_span() -> None:
    with pytest.raises(ValueError, match="set most_spans: 1"):
        InfillOptions(order="suffix_first")


def test_a_seed_from_scratch_has_the_tokens_and_an_expert_trains(project: Workspace) -> None:
    with pytest.raises(UserError, match=r"needs the tokens .*; add them to the seed with seed.tokens"):
        project.branch("hole", domain="prose", training={"objective": "infill"})
    with inline_launching():
        project.seed(tokens=TOKENS, force=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(project.layout.seed)
        assert [tokenizer.decode([token]) for token in tokenizer.convert_tokens_to_ids(TOKENS)] == TOKENS
        settings = {"objective": "infill", "objective_options": {"most_spans": 2}}
        project.branch("hole", domain="prose", force=True, training=settings)
        project.train("hole").raise_for_failures()
    assert project.evaluate("hole", domains=["prose"]).scores["hole"]["prose"].values["bits_per_byte"] > 0


def test_an_imported_seed_gets_rows_for_its_new_tokens(tmp_path: Path) -> None:
    workspace = make_chat_project(tmp_path, {})
    before = AutoModelForCausalLM.from_pretrained(workspace.layout.seed)
    workspace.seed(tmp_path / "model", tokens=TOKENS, force=True)
    after = AutoModelForCausalLM.from_pretrained(workspace.layout.seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(workspace.layout.seed)
    rows = before.config.vocab_size
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [rows, rows + 1, rows + 2]
    assert json.loads((workspace.layout.seed / "config.json").read_text())["vocab_size"] == rows + 3
    for name, tensor in after.state_dict().items():
        old = before.state_dict()[name]
        assert torch.equal(tensor[: len(old)], old)
        if len(tensor) != len(old):
            torch.testing.assert_close(tensor[len(old) :], old.mean(dim=0).expand(3, -1))
    assert tokenizer.chat_template is not None
    assert "<|im_start|>" in tokenizer.all_special_tokens
    assert not (tmp_path / "model" / "tokenizer.json").samefile(workspace.layout.seed / "tokenizer.json")


def test_a_conversation_is_refused(tmp_path: Path) -> None:
    workspace = make_chat_project(tmp_path, {})
    workspace.seed(tmp_path / "model", tokens=TOKENS, force=True)
    settings = {"objective": "infill", "objective_options": {"most_spans": 2}}
    with pytest.raises(UserError, match="reads text, and domain 'talks' holds conversations"):
        workspace.branch("hole", domain="talks", training=settings)
