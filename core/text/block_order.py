"""Which block of a run's text comes next: unions of domains, slices, and pseudo-random orders.

The block at a position is a pure function of the position and a seed, so an order needs no table and resumes anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .token_store import Blocks, Row


class BalancedUnion:
    """Round-robin union of several domains, so that each contributes the same number of tokens.

    An epoch ends once the largest domain was seen; smaller domains are repeated, each time in a new order.
    """

    def __init__(self, parts: Sequence[Blocks]) -> None:
        self.parts = tuple(parts)
        self.block_size = parts[0].block_size

    def __len__(self) -> int:
        return max(len(part) for part in self.parts) * len(self.parts)

    def part_at(self, position: Position) -> tuple[int, int]:
        """Return the index of the domain to draw from at a position, and the number of that domain's earlier draws."""
        return self._part_of_draw(position.epoch * len(self) + position.index)

    def _part_of_draw(self, number: int) -> tuple[int, int]:
        part_number, part = divmod(number, len(self.parts))
        return part, part_number


class SharedUnion(BalancedUnion):
    """Weighted union of several domains, whose blocks are spread evenly.

    At any point each domain is within one block of its share. The order of domains repeats after `period` blocks. An
    epoch has as many blocks as all domains together, rounded up to a multiple of the period.
    """

    period = 1000

    def __init__(self, parts: Sequence[Blocks], shares: Sequence[float]) -> None:
        super().__init__(parts)
        total = sum(shares)
        self._order = _interleave([share / total for share in shares], self.period)
        self._counts_before = [[0] * len(parts)]
        """Number of blocks of each domain before each offset of a period."""
        for part in self._order:
            counts = list(self._counts_before[-1])
            counts[part] += 1
            self._counts_before.append(counts)

    def __len__(self) -> int:
        return -(-sum(len(part) for part in self.parts) // self.period) * self.period

    def _part_of_draw(self, number: int) -> tuple[int, int]:
        periods, offset = divmod(number, self.period)
        part = self._order[offset]
        return part, periods * self._counts_before[-1][part] + self._counts_before[offset][part]


def _interleave(shares: Sequence[float], length: int) -> list[int]:
    """Return a sequence with each index in proportion to its share: next comes the index furthest behind."""
    counts = [0] * len(shares)
    order = []
    for position in range(1, length + 1):
        part = max(range(len(shares)), key=lambda index: shares[index] * position - counts[index])
        counts[part] += 1
        order.append(part)
    return order


class RandomSlice:
    """One of `count` equal, disjoint random slices of a source; the same seed gives the same slices."""

    def __init__(self, blocks: Blocks, index: int, count: int, seed: int) -> None:
        self.blocks, self.seed = blocks, seed
        self.block_size = blocks.block_size
        self._begin = index * len(blocks) // count
        self._end = (index + 1) * len(blocks) // count

    def __len__(self) -> int:
        return self._end - self._begin

    def row(self, index: int) -> Row:
        """Return block `index` of the slice."""
        return self.blocks.row(shuffled(self._begin + index, len(self.blocks), self.seed))


class Concatenation:
    """Concatenation of several domains, each represented in proportion to its number of blocks."""

    def __init__(self, parts: Sequence[Blocks]) -> None:
        self.parts = tuple(parts)
        self.block_size = parts[0].block_size

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def row(self, index: int) -> Row:
        """Return block `index` of all domains, one after the other."""
        for part in self.parts:
            if index < len(part):
                return part.row(index)
            index -= len(part)
        raise IndexError(index)


@dataclass(frozen=True)
class Position:
    """Position in the data order: the next block to draw."""

    epoch: int = 0
    index: int = 0

    def advanced(self, count: int, epoch_size: int) -> Position:
        """Return the position `count` blocks later."""
        epochs, index = divmod(self.index + count, epoch_size)
        return Position(self.epoch + epochs, index)


def draw(blocks: Blocks | BalancedUnion, position: Position, seed: int) -> Row:
    """Return the block at a position of the order given by `seed`, a pure function of its arguments."""
    if isinstance(blocks, BalancedUnion):
        part_index, part_number = blocks.part_at(position)
        part = blocks.parts[part_index]
        epoch, index = divmod(part_number, len(part))
        return draw(part, Position(epoch, index), seed + 1_000_003 * (part_index + 1))
    return blocks.row(shuffled(position.index, len(blocks), seed * 1_000_033 + position.epoch))


def cut(row: Row, length: int) -> list[Row]:
    """Return a block of text in pieces of `length` predicted tokens, which divides its own; the last token of one begins the next.

    So the pieces predict the same tokens as the block, each once, and differ in how many they see before them.
    """
    assert row.counted is None, "conversations end where their block ends"
    assert row.positions is None, "conversations end where their block ends"
    return [Row(row.tokens[begin : begin + length + 1]) for begin in range(0, len(row.tokens) - 1, length)]


def domain_at(blocks: Blocks | BalancedUnion, position: Position) -> int:
    """Return the index of the part that a union draws from at a position; 0 for a single source."""
    return blocks.part_at(position)[0] if isinstance(blocks, BalancedUnion) else 0


def shuffled(index: int, size: int, seed: int) -> int:
    """Return the image of `index` under the pseudo-random permutation of 0..size-1 given by `seed`.

    A four-round Feistel network over the next even power of two with cycle walking. It needs no table, so memory
    does not grow with the corpus.
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is not in 0..{size - 1}")
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(right, seed, round_number) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int, seed: int, round_number: int) -> int:
    """Round function of the Feistel network: the 64-bit finaliser of MurmurHash3."""
    word = (value + 0x9E3779B97F4A7C15 * (seed * 4 + round_number + 1)) & 0xFFFFFFFFFFFFFFFF
    word = (word ^ (word >> 33)) * 0xFF51AFD7ED558CCD & 0xFFFFFFFFFFFFFFFF
    word = (word ^ (word >> 33)) * 0xC4CEB9FE1A85EC53 & 0xFFFFFFFFFFFFFFFF
    return word ^ (word >> 33)
