"""Blocks and windows of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertctl.core.errors import UserError
from expertctl.core.text.conversation_blocks import ConversationBlocks, ConversationWindows, blocks_of, windows_of
from expertctl.core.text.token_store import EncodedDocument, TokenStore, write_conversations

SEPARATOR, SPECIAL = 0, 1
Conversation = list[tuple[int, bool]]
conversations = st.lists(st.lists(st.tuples(st.integers(1, 90), st.booleans()), max_size=14), min_size=1, max_size=8)


def written(folder: Path, talks: Sequence[Conversation], shard_tokens: int = 1 << 20) -> TokenStore:
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        EncodedDocument("a", [token for token, _ in talk], 0, [counts for _, counts in talk], "äb") for talk in talks
    ]
    write_conversations(folder, documents, markers=(SEPARATOR, SPECIAL), vocabulary=100, shard_tokens=shard_tokens)
    return TokenStore(folder)


def counted_targets(talks: Sequence[Conversation], without: Sequence[int] = ()) -> list[list[tuple[int, ...]]]:
    """Return for each conversation its counted tokens, each with the tokens before it."""
    tokens = [[token for token, _ in talk] for talk in talks]
    return [
        [
            tuple(ids[: place + 1])
            for place, (token, counts) in enumerate(talk)
            if counts and place > 0 and token not in without
        ]
        for ids, talk in zip(tokens, talks, strict=True)
    ]


@given(conversations, st.integers(2, 9), st.booleans(), st.integers(4, 40))
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_counted_token_is_a_target_once_behind_its_own_conversation(
    tmp_path: Path, talks: list[Conversation], size: int, packed: bool, shard_tokens: int
) -> None:
    blocks = ConversationBlocks(written(tmp_path, talks, shard_tokens), size, packed=packed)
    seen = []
    for index in range(len(blocks)):
        row = blocks.row(index)
        assert row.counted is not None
        assert row.tokens.shape == row.counted.shape == (size + 1,)
        assert row.counted.any(), "a block without targets teaches nothing"
        positions = row.positions if row.positions is not None else np.arange(size + 1)
        for place in np.flatnonzero(row.counted):
            begin = place - positions[place]
            assert positions[place] > 0
            seen.append(tuple(row.tokens[begin : place + 1].tolist()))
    expected = [target for talk in counted_targets(talks) for target in talk]
    assert len(seen) == len(expected)
    for found, whole in zip(
        sorted(seen, key=lambda ids: ids[-1]), sorted(expected, key=lambda ids: ids[-1]), strict=True
    ):
        assert found[-1] == whole[-1]
    for found in seen:
        assert any(whole[-len(found) :] == found for whole in expected)
    if not packed and all(len(talk) <= size + 1 for talk in talks):
        assert sorted(seen) == sorted(expected)


def test_packed_blocks_hold_what_fits_in_order(tmp_path: Path) -> None:
    talks = [
        [(10 * talk + place, place > 0) for place in range(size)] for talk, size in enumerate([3, 2, 4, 5, 2], start=1)
    ]
    store = written(tmp_path, talks)
    packed = ConversationBlocks(store, 5, packed=True)
    rows = [packed.row(index) for index in range(len(packed))]
    assert [row.tokens.tolist() for row in rows] == [
        [10, 11, 12, 20, 21, 0],
        [30, 31, 32, 33, 0, 0],
        [40, 41, 42, 43, 44, 0],
        [50, 51, 0, 0, 0, 0],
    ]
    assert rows[0].positions is not None
    assert rows[0].counted is not None
    assert rows[0].positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert rows[0].counted.tolist() == [False, True, True, False, True, False]
    assert packed.block(0).tolist() == [10, 11, 12, 20, 21]
    assert len(blocks_of(store, 5)) == 5


@given(conversations, st.integers(1, 9), st.data())
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_windows_score_every_counted_token_once_with_context(
    tmp_path: Path, talks: list[Conversation], context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    windows = ConversationWindows(written(tmp_path, talks), context, stride)
    expected = [target for talk in counted_targets(talks, (SEPARATOR, SPECIAL)) for target in talk]
    seen = []
    rows = 0
    for batch in windows.batches(3):
        rows += len(batch.tokens)
        assert batch.tokens.shape[1] <= context + 1
        for tokens, scored in zip(batch.tokens.tolist(), batch.scored, strict=True):
            seen += [tuple(tokens[: place + 2]) for place in np.flatnonzero(scored)]
    assert rows == len(windows)
    assert sorted(ids[-1] for ids in seen) == sorted(ids[-1] for ids in expected)
    for found in seen:
        whole = [ids for ids in expected if ids[-len(found) :] == found]
        assert whole
        assert any(found == ids or len(found) > windows.context - windows.stride for ids in whole)


def test_a_part_of_conversations_is_read_as_one(tmp_path: Path) -> None:
    store = written(tmp_path, [[(5, False), (6, True)]])
    assert type(blocks_of(store, 4)) is ConversationBlocks
    assert type(windows_of(store, 4, 2)) is ConversationWindows
    assert store.part.counted_tokens == 1
    assert store.part.bytes == 3
    assert blocks_of(store, 4).num_targets == 1
    with pytest.raises(AssertionError):
        blocks_of(store, 4, packed=True).window(0)


def test_the_digest_depends_on_what_counts(tmp_path: Path) -> None:
    digests = {
        written(tmp_path / str(number), [[(5, False), (6, counts)]]).part.digest
        for number, counts in enumerate((True, False))
    }
    assert len(digests) == 2


def test_a_damaged_stream_is_found(tmp_path: Path) -> None:
    store = written(tmp_path, [[(5, False), (6, True)]])
    for name in ("counted-00000.bin", "ends-00000.bin"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1])
        with pytest.raises(UserError, match="is damaged"):
            TokenStore(tmp_path)
        (tmp_path / name).write_bytes(content)
    assert len(TokenStore(tmp_path)) == len(store)
