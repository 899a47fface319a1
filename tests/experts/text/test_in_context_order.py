"""Documents side by side with those that are most like them: the path, the order, and what training then sees."""

from __future__ import annotations

import inspect
import json
import random
import statistics
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expertctl import DocumentOrder, UserError, Workspace
from expertctl.core.testing import tiny_model_folder
from expertctl.core.text.clustering.clusterer import unit_rows
from expertctl.core.text.clustering.neighbours import nearest_neighbours
from expertctl.core.text.token_store import TokenBlocks
from expertctl.core.text.tokenizer import TextEncoder
from expertctl.experts.text import corpora
from expertctl.experts.text.in_context_order import greedy_path, in_context_order, text_points
from expertctl.experts.text.spooled_texts import SpooledTexts


def documents() -> list[str]:
    """Pieces of three modules, shuffled."""
    texts = []
    for module in (textwrap, random, statistics):
        lines = inspect.getsource(module).splitlines()
        texts += ["\n".join(lines[begin : begin + 8]) for begin in range(0, len(lines), 8)]
    random.Random(0).shuffle(texts)
    return texts


def naive_path(points: np.ndarray, count: int) -> list[int]:
    """Algorithm 1, said once more with sets and dictionaries."""
    ties: dict[int, dict[int, float]] = {row: {} for row in range(len(points))}
    neighbours = nearest_neighbours(points, count)
    for row in range(len(points)):
        for place, cosine in zip(neighbours.places[row].tolist(), neighbours.similarities[row].tolist(), strict=True):
            if place >= 0:
                ties[row][place] = max(cosine, ties[row].get(place, -1))
                ties[place][row] = max(cosine, ties[place].get(row, -1))
    left, path = set(ties), []
    while left:
        place = min(left, key=lambda row: (len(ties[row]), row))
        while place in left:
            left.remove(place)
            path.append(place)
            onward = [near for near in ties[place] if near in left]
            if onward:
                place = min(onward, key=lambda row, here=place: (-ties[here][row], row))
    return path


@given(st.integers(0, 60), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_path_is_that_of_the_papers_algorithm(size: int, count: int, seed: int) -> None:
    points = unit_rows(np.random.default_rng(seed).normal(size=(size, 4)))
    assert greedy_path(nearest_neighbours(points, count)) == naive_path(points, count)


@given(st.lists(st.text(alphabet="ab cd", max_size=12), max_size=30))
@example(["aa ab", "aa ab", "aa ab"])
@settings(max_examples=40, deadline=None)
def test_any_texts_come_back_each_once(texts: list[str]) -> None:
    order = in_context_order(texts)
    assert sorted(order) == list(range(len(texts)))
    assert order == in_context_order(texts)


def test_neighbours_are_more_alike_than_by_chance() -> None:
    texts = documents()
    points = text_points(texts)
    assert points is not None

    def mean_similarity(order: list[int]) -> float:
        ordered = points[order]
        return float((ordered[1:] * ordered[:-1]).sum(axis=1).mean())

    by_chance = mean_similarity(list(range(len(texts))))
    assert mean_similarity(in_context_order(texts)) > by_chance + 0.2


def test_spooled_texts_are_read_in_any_order(tmp_path: Path) -> None:
    texts = ["one", "", "zwei ü", "\ud83d", "three\nlines"]
    with SpooledTexts(iter(texts), tmp_path) as spooled:
        assert len(spooled) == 5
        assert [spooled[place] for place in (4, 0, 2, 3, 1, -1)] == [
            *(texts[p] for p in (4, 0, 2, 3, 1)),
            texts[4],
        ]
        assert spooled[1:4] == texts[1:4]
        assert list(spooled) == texts
        with pytest.raises(IndexError):
            spooled[5]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    texts = documents()
    for part, some in (("train", texts[40:]), ("valid", texts[:40])):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    settings = {"train": "train.jsonl", "valid": "valid.jsonl"}
    config = {"domains": {"given": settings, "sorted": {**settings, "order": "in_context"}}}
    (tmp_path / "expertctl.yaml").write_text(yaml.safe_dump(config))
    workspace = Workspace(tmp_path)
    workspace.seed(tiny_model_folder(tmp_path / ".origin"))
    return workspace


def test_training_blocks_hold_documents_that_belong_together(workspace: Workspace) -> None:
    given_, sorted_ = workspace.prepare()
    assert given_.train.tokens == sorted_.train.tokens
    assert given_.train.digest != sorted_.train.digest
    assert given_.valid == sorted_.valid
    encoder = TextEncoder.of_folder(workspace.layout.seed)
    texts = [json.loads(line)["text"] for line in (workspace.root / "train.jsonl").read_text().splitlines()]
    modules = [inspect.getsource(module) for module in (textwrap, random, statistics)]
    home = {text: next(number for number, source in enumerate(modules) if text in source) for text in texts}

    def mixed_blocks(prepared: corpora.PreparedDomain) -> float:
        """Return the share of blocks of 512 tokens whose documents are of more than one module."""
        store = prepared.open("train")
        stream = store.read(0, len(store)).tolist()
        starts = [place + 1 for place, token in enumerate(stream) if token == encoder.separator][:-1]
        ends = [place for place, token in enumerate(stream) if token == encoder.separator][1:]
        decoded = [encoder.tokenizer.decode(stream[a:b]) for a, b in zip(starts, ends, strict=True)]
        assert sorted(decoded) == sorted(texts)
        blocks, mixed = TokenBlocks(store, 512), []
        for block in range(len(blocks)):
            inside = [home[text] for text, a in zip(decoded, starts, strict=True) if a // 512 == block]
            mixed.append(len(set(inside)) > 1)
        return sum(mixed) / len(mixed)

    assert mixed_blocks(sorted_) < 0.6 * mixed_blocks(given_)


def test_the_order_is_part_of_what_was_prepared(workspace: Workspace) -> None:
    before = workspace.prepare(["sorted"])[0]
    path = workspace.root / "expertctl.yaml"
    path.write_text(path.read_text().replace("order: in_context", "order: null"))
    after = Workspace(workspace.root).prepare(["sorted"])[0]
    assert after.train.digest != before.train.digest


def test_an_unknown_order_is_told_with_the_choices(workspace: Workspace) -> None:
    path = workspace.root / "expertctl.yaml"
    path.write_text(path.read_text().replace("in_context", "in_contxt"))
    with pytest.raises(UserError, match="no document order 'in_contxt' \\(did you mean 'in_context'\\?\\)"):
        Workspace(workspace.root).prepare(["sorted"])


def test_a_plugins_order_is_used_and_held_to_its_word(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    offers = {
        "in_context": DocumentOrder("in_context", "", lambda texts: sorted(range(len(texts)), key=texts.__getitem__))
    }
    monkeypatch.setattr(corpora.installed_plugins(), "offer", lambda kind, name: offers[name])
    prepared = workspace.prepare(["sorted"])[0]
    store = prepared.open("train")
    encoder = TextEncoder.of_folder(workspace.layout.seed)
    texts = sorted(json.loads(line)["text"] for line in (workspace.root / "train.jsonl").read_text().splitlines())
    first = encoder.encode(texts[:1])[0]
    assert store.read(1, 1 + len(first)).tolist() == first
    offers["in_context"] = DocumentOrder("in_context", "", lambda texts: [0] * len(texts))
    with pytest.raises(RuntimeError, match="does not return a permutation"):
        workspace.prepare(["sorted"], force=True)
