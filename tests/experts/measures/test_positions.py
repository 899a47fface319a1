"""Loss by position, against a plain loop over windows and tokens."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import make_chat_project
from hypothesis import given
from hypothesis import strategies as st

from expertctl import UserError, Workspace, load_model
from expertctl.cli.use.eval import position_table
from expertctl.experts.measures.positions import bucket_ends


def naive(workspace: Workspace, domain: str, context: int, first: int) -> tuple[dict[int, list[float]], int]:
    """Return the bits of every scored token by number of its bucket, and the number of tokens."""
    (prepared,) = workspace.data.prepare([domain])
    store = prepared.open("test" if prepared.test is not None else "valid")
    model: Any = load_model(workspace.layout.seed)[0].double().eval()
    bits: dict[int, list[float]] = {}
    spans = [(0, len(store))]
    if store.has_conversations:
        ends = [0, *store.ends.tolist()]
        spans = list(itertools.pairwise(ends))
    for first_token, last in spans:
        begin = first_token
        while begin < last - 1:
            window_begin = min(begin, max(last - 1 - context, first_token))  # the last window ends with the text
            tokens = torch.from_numpy(store.read(window_begin, min(window_begin + context + 1, last)))
            with torch.inference_mode():
                log_probs = torch.log_softmax(model(tokens[None, :-1]).logits[0], dim=-1)
            for place in range(begin - window_begin, len(tokens) - 1):
                target = int(tokens[place + 1])
                counts = (
                    not store.has_conversations or store.counted(window_begin + place + 1, window_begin + place + 2)[0]
                )
                if target in store.part.markers or not counts:
                    continue
                number = 0
                while place >= first * 2**number:
                    number += 1
                bits.setdefault(number, []).append(-float(log_probs[place, target]) / math.log(2))
            begin += context
    return bits, sum(map(len, bits.values()))


def require_naive(workspace: Workspace, domain: str, context: int, first: int) -> dict[str, Any]:
    table = workspace.evaluate("seed", domains=[domain], context=context, by_position=first)
    content = json.loads(json.dumps(table.as_json()))["models"]["seed"]
    expected, tokens = naive(workspace, domain, context, first)
    assert content["tokens"][domain] == tokens
    everything = [value for values in expected.values() for value in values]
    assert content["bits_per_token"][domain] == pytest.approx(math.fsum(everything) / tokens, abs=1e-5)
    for number, bucket in enumerate(content["by_position"][domain]):
        values = expected.get(number, [])
        assert bucket["tokens"] == len(values)
        assert bucket["begin"] == (0 if number == 0 else first * 2 ** (number - 1))
        if values:
            assert bucket["bits_per_token"] == pytest.approx(sum(values) / len(values), abs=1e-5)
        else:
            assert bucket["bits_per_token"] is None
    return content


@pytest.mark.parametrize(("context", "first"), [(48, 8), (30, 5)])
def test_buckets_of_text_are_those_of_a_plain_loop(project: Workspace, context: int, first: int) -> None:
    content = require_naive(project, "prose", context, first)
    buckets = content["by_position"]["prose"]
    assert [bucket["end"] for bucket in buckets] == ([8, 16, 32, 48] if first == 8 else [5, 10, 20, 30])
    assert content["text"]["prose"]["stride"] == context
    assert all(bucket["tokens"] for bucket in buckets)


def test_buckets_of_conversations_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    require_naive(make_chat_project(tmp_path, {}), "talks", 64, 4)


def test_processes_share_the_work_and_tables_have_a_column_for_each_bucket(project: Workspace) -> None:
    alone = project.evaluate("seed", domains=["prose"], context=32, by_position=8)
    shared = project.evaluate("seed", domains=["prose"], context=32, by_position=8, nproc=2)
    assert shared.as_json() == alone.as_json()
    table = position_table(alone, "prose")
    assert table.columns == ("model", "0-7", "8-15", "16-31", "all")
    bits = alone.as_json()["models"]["seed"]["by_position"]["prose"]  # type: ignore[index]
    assert [*table.rows[0]][1:4] == [f"{bucket['bits_per_token']:.4f}" for bucket in bits]


@given(st.integers(1, 200), st.integers(1, 2000))
def test_buckets_cover_every_position_once(first: int, length: int) -> None:
    ends = bucket_ends(first, length)
    assert ends[-1] == length
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    assert all(size > 0 for size in sizes)
    assert sizes[:-1] == [first * 2 ** max(number - 1, 0) for number in range(len(sizes) - 1)]


def test_what_cannot_be_scored_by_position_is_refused(project: Workspace) -> None:
    with pytest.raises(UserError, match="windows do not overlap"):
        project.evaluate("seed", by_position=8, stride=4)
    with pytest.raises(UserError, match="has at least one, not 0"):
        project.evaluate("seed", by_position=0)
