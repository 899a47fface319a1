"""Tokens on disk and the order they are drawn in."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertctl.core.errors import UserError
from expertctl.core.text.block_order import (
    BalancedUnion,
    Concatenation,
    Position,
    RandomSlice,
    SharedUnion,
    domain_at,
    draw,
    shuffled,
)
from expertctl.core.text.token_store import EncodedDocument, Row, TokenBlocks, TokenStore, TokenWindows, write_part

SEPARATOR = 0
seeds = st.integers(0, 2**40)


@dataclass
class Numbered:
    """Blocks that hold just (name, their own number)."""

    name: int
    size: int
    block_size: int = 1

    def __len__(self) -> int:
        return self.size

    def row(self, index: int) -> Row:
        assert 0 <= index < self.size
        return Row(np.array([self.name, index]))


def written(folder: Path, documents: Sequence[Sequence[int]], **settings: Any) -> TokenStore:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [EncodedDocument("ä" * len(ids), ids) for ids in documents]
    write_part(folder, texts, **{"separator": SEPARATOR, "vocabulary": 300, **settings})
    return TokenStore(folder)


# --- the stream ---


def test_a_part_is_a_separator_and_then_every_document_with_one(tmp_path: Path) -> None:
    store = written(tmp_path, [[5, 6], [], [7]])
    assert store.read(0, 99).tolist() == [0, 5, 6, 0, 0, 7, 0]
    assert len(store) == 7
    assert (store.part.documents, store.part.bytes) == (3, 6)


def test_a_digest_tells_texts_and_their_borders_apart(tmp_path: Path) -> None:
    digests = set()
    for number, texts in enumerate((["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        part = write_part(folder, [EncodedDocument(text, [1]) for text in texts], separator=0, vocabulary=9)
        digests.add(part.digest)
    assert len(digests) == 4
    encoded = b"".join(len(text).to_bytes(8, "little") + text for text in (b"ab", b"c"))
    assert hashlib.sha256(encoded).hexdigest() in digests


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_tokens_take_two_bytes_where_they_fit(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    store = written(tmp_path, [[vocabulary - 1]], vocabulary=vocabulary)
    assert store.part.dtype == dtype
    assert store.read(0, 9).tolist() == [0, vocabulary - 1, 0]


documents_of_tokens = st.lists(st.lists(st.integers(1, 299), max_size=7), max_size=9)


@given(documents_of_tokens, st.integers(1, 20))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_reading_across_shards_equals_one_big_array(
    tmp_path: Path, documents: list[list[int]], shard_tokens: int
) -> None:
    store = written(tmp_path, documents, shard_tokens=shard_tokens)
    whole = [SEPARATOR, *(token for ids in documents for token in (*ids, SEPARATOR))]
    assert len(store) == len(whole)
    for begin in range(0, len(whole) + 2, 3):
        for end in range(begin, len(whole) + 3, 2):
            assert store.read(begin, end).tolist() == whole[begin:end]


def test_a_damaged_part_is_refused_with_the_way_to_mend_it(tmp_path: Path) -> None:
    store = written(tmp_path, [[1, 2, 3]])
    path = tmp_path / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"tokens-00000\.bin is damaged; delete .* and run `expertctl data prepare`"):
        TokenStore(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"tokens-00000\.bin is damaged"):
        TokenStore(tmp_path)
    content = json.loads((tmp_path / "part.json").read_text())
    for bad in ({**content, "extra": 1}, {"shard_tokens": [1]}, {}):
        (tmp_path / "part.json").write_text(json.dumps(bad))
        with pytest.raises(UserError, match=r"part\.json is damaged"):
            TokenStore(tmp_path)
    assert store.part.tokens == 5


# --- blocks ---


@given(st.lists(st.integers(1, 299), min_size=0, max_size=40), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_token_but_the_first_is_a_target_exactly_once(
    tmp_path: Path, document: list[int], size: int, batch_size: int
) -> None:
    blocks = TokenBlocks(written(tmp_path, [document]), size)
    stream = [SEPARATOR, *document, SEPARATOR]
    batches = [batch.tokens for batch in blocks.windows(batch_size)]
    targets = [token for batch in batches for row in batch for token in row[1:].tolist()]
    assert targets == stream[1:]
    assert blocks.num_targets == len(targets)
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        for row in batch:
            assert len(row) >= 2
    rows = [row.tolist() for batch in batches for row in batch]
    for before, after in pairwise(rows):
        assert before[-1] == after[0], "the last target is the next block's first input"


def test_a_limit_ends_after_that_many_whole_blocks(tmp_path: Path) -> None:
    blocks = TokenBlocks(written(tmp_path, [list(range(1, 30))]), 4)
    assert len(blocks) == 7
    assert [batch.tokens.shape for batch in blocks.windows(2, limit=3)] == [(2, 5), (1, 5)]
    assert [batch.tokens.shape for batch in blocks.windows(9)] == [(7, 5), (1, 3)]


def test_a_part_smaller_than_a_block_gives_its_rest(tmp_path: Path) -> None:
    blocks = TokenBlocks(written(tmp_path, [[1, 2]]), 16)
    assert len(blocks) == 0
    assert [batch.tokens.tolist() for batch in blocks.windows(8, limit=4)] == [[[0, 1, 2, 0]]]


# --- order ---


@given(st.integers(1, 700), seeds)
def test_shuffling_is_a_permutation_for_any_size_and_seed(size: int, seed: int) -> None:
    assert sorted(shuffled(index, size, seed) for index in range(size)) == list(range(size))


def test_shuffling_mixes_and_depends_on_the_seed() -> None:
    """Neighbours do not stay neighbours, and two seeds agree about as often as chance has it (once)."""
    size = 1000
    first, second = ([shuffled(index, size, seed) for index in range(size)] for seed in (1, 2))
    assert sum(abs(a - b) == 1 for a, b in pairwise(first)) < 15
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 15
    thirds = Counter(position * 3 // size for position in first[: size // 3])
    assert min(thirds.values()) > 80


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 3), (3, 3)])
def test_positions_outside_the_store_are_an_error(index: int, size: int) -> None:
    with pytest.raises(IndexError):
        shuffled(index, size, 0)


@given(st.integers(1, 50), seeds, st.integers(0, 3))
@settings(deadline=None)
def test_every_epoch_draws_every_block_once_and_anew(size: int, seed: int, epoch: int) -> None:
    blocks = Numbered(0, size)
    drawn = [int(draw(blocks, Position(epoch, index), seed).tokens[1]) for index in range(size)]
    assert sorted(drawn) == list(range(size))
    assert drawn == [int(draw(blocks, Position(epoch, index), seed).tokens[1]) for index in range(size)]
    if size > 20:
        assert drawn != [int(draw(blocks, Position(epoch + 1, index), seed).tokens[1]) for index in range(size)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), seeds, st.integers(0, 2))
@settings(deadline=None)
def test_a_balanced_union_gives_every_domain_the_same_share(sizes: list[int], seed: int, epoch: int) -> None:
    union = BalancedUnion([Numbered(name, size) for name, size in enumerate(sizes)])
    assert len(union) == max(sizes) * len(sizes)
    drawn = [draw(union, Position(epoch, index), seed).tokens.tolist() for index in range(len(union))]
    assert Counter(name for name, _ in drawn) == dict.fromkeys(range(len(sizes)), max(sizes))
    largest = sizes.index(max(sizes))
    assert sorted(index for name, index in drawn if name == largest) == list(range(max(sizes)))
    for name, size in enumerate(sizes):
        times = Counter(index for of, index in drawn if of == name)
        assert max(times.values()) - min(times[index] for index in range(size)) <= 2


@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.data(), seeds)
@settings(deadline=None, max_examples=30)
def test_domains_give_their_shares_at_any_point(sizes: list[int], data: st.DataObject, seed: int) -> None:
    shares = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    union = SharedUnion([Numbered(name, size) for name, size in enumerate(sizes)], shares)
    drawn = [draw(union, Position(0, index), seed).tokens.tolist() for index in range(300)]
    for end in (1, 10, 100, 300):
        counts = Counter(name for name, _ in drawn[:end])
        for name, share in enumerate(shares):
            assert abs(counts[name] - end * share / sum(shares)) <= len(sizes)
    for name, size in enumerate(sizes):
        mine = [index for of, index in drawn if of == name]
        assert len(mine) < size or sorted(mine[:size]) == list(range(size))
        assert [domain_at(union, Position(0, index)) == name for index in range(300)] == [of == name for of, _ in drawn]


def test_domains_of_a_union_are_shuffled_each_for_itself() -> None:
    union = BalancedUnion([Numbered(name, 100) for name in range(2)])
    orders: dict[int, list[int]] = {0: [], 1: []}
    for index in range(len(union)):
        name, block = draw(union, Position(0, index), 3).tokens.tolist()
        orders[name].append(block)
    assert sum(mine == other for mine, other in zip(*orders.values(), strict=True)) < 10


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 6), seeds)
@settings(deadline=None)
def test_random_slices_part_the_blocks_among_them(sizes: list[int], count: int, seed: int) -> None:
    together = Concatenation([Numbered(name, size) for name, size in enumerate(sizes)])
    slices = [RandomSlice(together, index, count, seed) for index in range(count)]
    drawn = [tuple(part.row(index).tokens.tolist()) for part in slices for index in range(len(part))]
    assert sorted(drawn) == [(name, index) for name, size in enumerate(sizes) for index in range(size)]
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_a_concatenation_is_its_parts_end_to_end() -> None:
    together = Concatenation([Numbered(0, 2), Numbered(1, 1)])
    assert [together.row(index).tokens.tolist() for index in range(len(together))] == [[0, 0], [0, 1], [1, 0]]
    with pytest.raises(IndexError):
        together.row(3)


@given(st.integers(0, 5), st.integers(0, 9), st.integers(0, 40), st.integers(0, 40))
def test_positions_add_up(epoch: int, index: int, first: int, second: int) -> None:
    begin = Position(epoch, index)
    assert begin.advanced(first, 10).advanced(second, 10) == begin.advanced(first + second, 10)
    there = begin.advanced(first, 10)
    assert there.epoch * 10 + there.index == epoch * 10 + index + first
    assert 0 <= there.index < 10


# --- windows for evaluation ---


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(2, 299), max_size=30), min_size=1, max_size=6),
    context=st.integers(1, 40),
    stride=st.integers(1, 40),
    batch_size=st.integers(1, 4),
    begin=st.sampled_from([(), (1,)]),
)
def test_windows_score_every_token_of_the_text_once_and_none_between_documents(
    tmp_path: Path, documents: list[list[int]], context: int, stride: int, batch_size: int, begin: tuple[int, ...]
) -> None:
    store = written(tmp_path / "store", documents, begin=begin)
    windows = TokenWindows(store, context, min(stride, context))
    scored = []
    for batch in windows.batches(batch_size):
        assert batch.tokens.shape[1] == batch.scored.shape[1] + 1 <= context + 1
        scored += batch.tokens[:, 1:][batch.scored].tolist()
    assert scored == [token for document in documents for token in document]


def test_windows_after_the_first_score_their_last_tokens_with_context_before_them(tmp_path: Path) -> None:
    store = written(tmp_path, [list(range(1, 12))])  # 0 1 2 ... 11 0: twelve targets
    (batch,) = TokenWindows(store, 4, 2).batches(9)
    assert batch.tokens[:, 0].tolist() == [0, 2, 4, 6, 8]
    assert batch.scored.tolist() == [[True] * 4, *[[False, False, True, True]] * 3, [False, False, True, False]]


def test_documents_begin_with_the_given_tokens_which_stand_for_no_text(tmp_path: Path) -> None:
    store = written(tmp_path, [[5, 6], [7]], begin=(2, 3))
    assert store.read(0, 99).tolist() == [0, 2, 3, 5, 6, 0, 2, 3, 7, 0]
    assert store.part.markers == (0, 2, 3)
