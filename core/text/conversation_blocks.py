"""Conversations on disk, alone or in pairs, read as blocks for training and as windows for evaluation.

No block continues another conversation: one that is shorter than a block is filled up with separators, which do not count,
and one that is longer is cut into pieces, of which those without counted tokens are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from .token_store import Row, TokenBlocks, TokenStore, TokenWindows, Windows, stacked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ConversationBlocks(TokenBlocks):
    """The blocks of a part of conversations, in order: one conversation each, or several if `packed`."""

    def __init__(self, store: TokenStore, block_size: int, *, packed: bool = False) -> None:
        super().__init__(store, block_size)
        self.packed = packed

    @cached_property
    def _pieces(self) -> NDArray[np.int64]:
        """First token of each piece and the token after its last, (pieces, 2)."""
        import numpy as np

        ends = self.store.ends
        begins = np.concatenate(([0], ends[:-1])) if len(ends) else ends
        counts = np.maximum(-(-(ends - begins - 1) // self.block_size), 0)  # a piece's last token begins the next piece
        first = np.repeat(begins, counts)
        numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        first = first + numbers * self.block_size
        pieces = np.stack((first, np.minimum(first + self.block_size + 1, np.repeat(ends, counts))), axis=1)
        has_targets = [bool(self.store.counted(begin + 1, end).any()) for begin, end in pieces]
        kept: NDArray[np.int64] = pieces[np.array(has_targets, dtype=bool)]
        return kept

    @cached_property
    def _first_pieces(self) -> NDArray[np.int64]:
        """Number of the first piece of each block, and the number of pieces, (blocks + 1,)."""
        import numpy as np

        if not self.packed:
            return np.arange(len(self._pieces) + 1)
        firsts, room = [], 0
        for number, size in enumerate(self._pieces[:, 1] - self._pieces[:, 0]):
            if size > room:
                firsts.append(number)
                room = self.block_size + 1
            room -= int(size)
        return np.array([*firsts, len(self._pieces)])

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._first_pieces) - 1

    @property
    def num_targets(self) -> int:
        """Number of tokens that count."""
        return self.store.part.counted_tokens or 0

    def block(self, index: int) -> NDArray[np.int64]:
        """Return the tokens of block `index`: at most block_size + 1."""
        import numpy as np

        return np.concatenate([self.store.read(begin, end) for begin, end in self._pieces_of(index)])

    def row(self, index: int) -> Row:
        """Return block `index` filled up, with the tokens that count and, if packed, positions in the conversations."""
        import numpy as np

        tokens = np.full(self.block_size + 1, self.store.part.markers[0], dtype=np.int64)
        counted = np.zeros(self.block_size + 1, dtype=bool)
        positions = np.arange(self.block_size + 1)
        offset = 0
        for begin, end in self._pieces_of(index):
            place = slice(offset, offset + end - begin)
            tokens[place] = self.store.read(begin, end)
            counted[place] = self.store.counted(begin, end)
            counted[offset] = False  # the token before it is not its context
            positions[offset:] = np.arange(len(positions) - offset)
            offset = place.stop
        return Row(tokens, counted, positions if self.packed else None)

    def _pieces_of(self, index: int) -> NDArray[np.int64]:
        return self._pieces[self._first_pieces[index] : self._first_pieces[index + 1]]

    def window(self, index: int) -> Windows:
        """Return block `index` filled up with the targets that count, as one row; blocks are not packed."""
        assert not self.packed, "a window is read as one document"
        row = self.row(index)
        assert row.counted is not None, "a conversation says what counts"
        return Windows(row.tokens[None], row.counted[None, 1:])

    def windows(self, batch_size: int, *, limit: int | None = None) -> Iterator[Windows]:
        """Yield the blocks in order, filled up; stop after `limit` blocks."""
        count = len(self) if limit is None else min(limit, len(self))
        for first in range(0, count, batch_size):
            yield stacked(self.window(index) for index in range(first, min(first + batch_size, count)))


class PairBlocks(ConversationBlocks):
    """The blocks of a part with pairs: both conversations of one, apart by their positions, the better one first.

    Pairs that are longer than a block are left out.
    """

    def __init__(self, store: TokenStore, block_size: int) -> None:
        super().__init__(store, block_size, packed=True)

    @cached_property
    def _pieces(self) -> NDArray[np.int64]:
        import numpy as np

        ends = self.store.ends
        begins = np.concatenate(([0], ends[:-1]))
        fits = ends[1::2] - begins[::2] <= self.block_size + 1
        return np.stack((begins, ends), axis=1)[np.repeat(fits, 2)]

    @cached_property
    def _first_pieces(self) -> NDArray[np.int64]:
        import numpy as np

        return np.arange(0, len(self._pieces) + 1, 2)

    @property
    def num_left_out(self) -> int:
        """Number of pairs that are longer than a block."""
        return self.store.part.documents - len(self)

    def window(self, index: int) -> Windows:
        """Return the better conversation of pair `index`, filled up, with the targets that count."""
        import numpy as np

        row = self.row(index)
        assert row.counted is not None, "a conversation says what counts"
        begin, end = self._pieces[2 * index]
        return Windows(row.tokens[None], (row.counted & (np.arange(len(row.counted)) < end - begin))[None, 1:])


class ConversationWindows(TokenWindows):
    """A part of conversations as windows, in which every counted token is scored once, after its own conversation."""

    def __init__(self, store: TokenStore, context: int, stride: int) -> None:
        """Cut windows of at most `context` inputs; those of one conversation begin `stride` tokens apart."""
        import numpy as np

        super().__init__(store, context, stride)
        ends = store.ends
        begins = np.concatenate(([0], ends[:-1]))
        if store.part.has_pairs:
            begins, ends = begins[::2], ends[::2]
        self.context = min(context, max(int((ends - begins).max(initial=0)) - 1, 1))
        self.stride = min(stride, self.context)
        targets = np.maximum(ends - begins - 1, 0)
        counts = np.where(targets > 0, 1 + -(-np.maximum(targets - self.context, 0) // self.stride), 0)
        numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._begins, self._ends = np.repeat(begins, counts), np.repeat(ends, counts)
        self._firsts = np.minimum(
            self._begins + numbers * self.stride, np.maximum(self._ends - 1 - self.context, self._begins)
        )
        self._scored_from = np.where(
            numbers > 0, self._begins + 1 + (numbers - 1) * self.stride + self.context, self._begins + 1
        )
        """The first token of each window that no window before it has scored."""

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self._firsts)

    def _windows(self, numbers: range) -> Windows:
        import numpy as np

        chosen = slice(numbers.start, numbers.stop)
        lasts = np.minimum(self._firsts[chosen] + self.context + 1, self._ends[chosen])
        longest = int((lasts - self._firsts[chosen]).max())
        tokens = np.full((len(numbers), longest), self.store.part.markers[0], dtype=np.int64)
        scored = np.zeros((len(numbers), longest), dtype=bool)
        for row, (first, last, begin) in enumerate(
            zip(self._firsts[chosen], lasts, self._scored_from[chosen], strict=True)
        ):
            tokens[row, : last - first] = self.store.read(first, last)
            scored[row, begin - first : last - first] = self.store.counted(begin, last)
        scored &= ~np.isin(tokens, self.store.part.markers)
        return Windows(tokens, scored[:, 1:])


def blocks_of(store: TokenStore, block_size: int, *, packed: bool = False) -> TokenBlocks:
    """Return the blocks of a part; `packed` puts several conversations into a block."""
    if store.part.has_pairs:
        return PairBlocks(store, block_size)
    if store.has_conversations:
        return ConversationBlocks(store, block_size, packed=packed)
    return TokenBlocks(store, block_size)


def windows_of(store: TokenStore, context: int, stride: int) -> TokenWindows:
    """Return the windows of a part."""
    return (ConversationWindows if store.has_conversations else TokenWindows)(store, context, stride)
