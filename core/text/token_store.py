"""Tokenised text on disk: memory-mapped shards, read in fixed blocks, in an order that needs no memory.

A part (`train` or `valid`) of a domain is one stream of tokens: a separator, then every document followed by
a separator. Block `i` of size S covers tokens `i*S` to `i*S + S`, the last of which is also the first of
block `i + 1`: inputs are all but the last, targets all but the first, so every token is predicted once.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from ..artefacts.files import read_json, readable_os_errors, write_json
from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = 1
PART_FILE = "part.json"
SHARD_TOKENS = 1 << 26


@dataclass(frozen=True)
class TokenPart:
    """What one tokenised part holds; `part.json` beside its shards."""

    dtype: str
    """`uint16` or `uint32`, little-endian."""
    shard_tokens: tuple[int, ...]
    documents: int
    tokens: int
    """Separators included."""
    bytes: int
    """UTF-8 bytes of the documents' text: what bits per byte divides by."""
    digest: str
    """sha256 over the documents' texts in order: which bytes a run saw."""
    format: int = FORMAT


def write_part(
    folder: Path,
    documents: Iterable[tuple[str, Sequence[int]]],
    *,
    separator: int,
    vocabulary: int,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenPart:
    """Write (text, token ids) documents into shards in `folder`, which must exist; memory stays flat.

    Beside each `tokens-*.bin` stands `documents-*.bin`: for every document that ends in the shard the number
    of its tokens and of its text's bytes, as two int64.
    """
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    state = hashlib.sha256()
    num_documents = num_bytes = 0
    with _ShardWriter(folder, dtype, shard_tokens) as shards:
        shards.add([separator])
        for text, ids in documents:
            encoded = text.encode("utf-8", errors="surrogatepass")
            state.update(len(encoded).to_bytes(8, "little") + encoded)
            shards.add([*ids, separator])
            shards.end_document(len(ids) + 1, len(encoded))
            num_documents += 1
            num_bytes += len(encoded)
    sizes = tuple(shards.sizes)
    part = TokenPart(dtype, sizes, num_documents, sum(sizes), num_bytes, state.hexdigest())
    write_json(folder / PART_FILE, asdict(part))
    return part


class _ShardWriter:
    """Appends tokens to numbered shards, beginning a new one after a document when one is full."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int) -> None:
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._open_files = ExitStack()
        self.sizes: list[int] = []

    def __enter__(self) -> Self:
        self._next_shard()
        return self

    def __exit__(self, *exception: object) -> None:
        with readable_os_errors(self._folder):
            self._open_files.close()

    def _next_shard(self) -> None:
        index = len(self.sizes)
        with readable_os_errors(self._folder):
            self._open_files.close()
            self._tokens, self._ends = (
                self._open_files.enter_context((self._folder / f"{kind}-{index:05d}.bin").open("wb"))
                for kind in ("tokens", "documents")
            )
        self.sizes.append(0)

    def add(self, ids: Sequence[int]) -> None:
        import numpy as np

        if self.sizes[-1] >= self._shard_tokens:
            self._next_shard()
        with readable_os_errors(self._folder):
            self._tokens.write(np.array(ids, dtype=self._dtype).tobytes())
        self.sizes[-1] += len(ids)

    def end_document(self, num_tokens: int, num_bytes: int) -> None:
        with readable_os_errors(self._folder):
            self._ends.write(struct.pack("<qq", num_tokens, num_bytes))


class TokenStore:
    """One tokenised part, memory-mapped: opening it reads no token."""

    def __init__(self, folder: Path) -> None:
        content = read_json(folder / PART_FILE)
        try:
            self.part = TokenPart(**{**content, "shard_tokens": tuple(content["shard_tokens"])})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder / PART_FILE} is damaged ({error}); delete {folder} and prepare it again"
            ) from None
        self.folder = folder
        for index, count in enumerate(self.part.shard_tokens):
            path = self._shard_path(index)
            expected = count * (2 if self.part.dtype == "uint16" else 4)
            if not path.exists() or path.stat().st_size != expected:
                raise UserError(f"{path} is damaged; delete {folder} and run `expertctl data prepare` again")

    def _shard_path(self, index: int) -> Path:
        return self.folder / f"tokens-{index:05d}.bin"

    @cached_property
    def _shards(self) -> list[NDArray[np.generic]]:
        import numpy as np

        return [
            np.memmap(self._shard_path(index), dtype=self.part.dtype, mode="r")
            for index in range(len(self.part.shard_tokens))
        ]

    def __len__(self) -> int:
        return self.part.tokens

    def read(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return tokens `begin` to `end` (clipped to what there is) as int64, across shard borders."""
        import numpy as np

        pieces = []
        offset = 0
        for shard, count in zip(self._shards, self.part.shard_tokens, strict=True):
            if begin < offset + count and end > offset:
                pieces.append(shard[max(begin - offset, 0) : end - offset])
            offset += count
        return np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, dtype=np.int64)

    def document_bytes(self) -> Iterator[tuple[int, int]]:
        """Yield (tokens with separator, text bytes) of every document, in stream order."""
        import numpy as np

        for index in range(len(self.part.shard_tokens)):
            path = self.folder / f"documents-{index:05d}.bin"
            for tokens, size in np.fromfile(path, dtype="<i8").reshape(-1, 2):
                yield int(tokens), int(size)


class Blocks(Protocol):
    """Anything that training draws from: numbered blocks of one size."""

    block_size: int

    def __len__(self) -> int: ...
    def block(self, index: int) -> NDArray[np.int64]: ...


class TokenBlocks:
    """The blocks of one part, in stream order."""

    def __init__(self, store: TokenStore, block_size: int) -> None:
        self.store = store
        self.block_size = block_size

    def __len__(self) -> int:
        """Return the number of whole blocks."""
        return (len(self.store) - 1) // self.block_size

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: all but the leading separator."""
        return len(self.store) - 1

    @property
    def num_bytes(self) -> int:
        return self.store.part.bytes

    def block(self, index: int) -> NDArray[np.int64]:
        """Return block `index`: block_size + 1 tokens (fewer for a rest at the end)."""
        begin = index * self.block_size
        return self.store.read(begin, begin + self.block_size + 1)

    def batches(self, batch_size: int, *, limit: int | None = None) -> Iterator[NDArray[np.int64]]:
        """Yield every token once, in order: arrays (B, block_size + 1), the rest at the end on its own.

        `limit` ends after that many whole blocks.
        """
        import numpy as np

        whole = len(self) if limit is None else min(limit, len(self))
        for first in range(0, whole, batch_size):
            yield np.stack([self.block(index) for index in range(first, min(first + batch_size, whole))])
        if whole == len(self) and self.num_targets > whole * self.block_size and (limit is None or not whole):
            yield self.block(whole)[None, :]


class BalancedUnion:
    """Several domains in turn, one block each, so that each gives the same number of tokens.

    An epoch ends when the largest domain was seen once; smaller ones begin again meanwhile, each time in a
    new order.
    """

    def __init__(self, parts: Sequence[Blocks]) -> None:
        self.parts = tuple(parts)
        self.block_size = parts[0].block_size
        self._largest = max(len(part) for part in parts)

    def __len__(self) -> int:
        return self._largest * len(self.parts)


class SharedUnion:
    """Several domains, each giving its share of the blocks, spread evenly: at any point it is within one block of it.

    The order of domains is the one in which each is as near to its share as can be; it begins again after `period`
    blocks. An epoch is as many blocks as all domains have, rounded up to whole periods.
    """

    period = 1000

    def __init__(self, parts: Sequence[Blocks], shares: Sequence[float]) -> None:
        self.parts = tuple(parts)
        self.block_size = parts[0].block_size
        total = sum(shares)
        self._order = _spread([share / total for share in shares], self.period)
        self._before = [[0] * len(parts)]
        """How many blocks of each domain come before each place of a period."""
        for which in self._order:
            counts = list(self._before[-1])
            counts[which] += 1
            self._before.append(counts)

    def __len__(self) -> int:
        return -(-sum(len(part) for part in self.parts) // self.period) * self.period

    def part_at(self, number: int) -> tuple[int, int]:
        """Return which domain the `number`-th block drawn is of, and how many of that domain came before it."""
        periods, place = divmod(number, self.period)
        which = self._order[place]
        return which, periods * self._before[-1][which] + self._before[place][which]


def _spread(shares: Sequence[float], count: int) -> list[int]:
    """Return a sequence in which each index comes by its share: next is always the one furthest behind."""
    given = [0] * len(shares)
    order = []
    for place in range(1, count + 1):
        which = max(range(len(shares)), key=lambda one: shares[one] * place - given[one])
        given[which] += 1
        order.append(which)
    return order


class RandomSlice:
    """One of `count` equal random slices of some blocks: the same blocks for the same seed, none in two."""

    def __init__(self, blocks: Blocks, index: int, count: int, seed: int) -> None:
        self.blocks, self.seed = blocks, seed
        self.block_size = blocks.block_size
        self._begin = index * len(blocks) // count
        self._end = (index + 1) * len(blocks) // count

    def __len__(self) -> int:
        return self._end - self._begin

    def block(self, index: int) -> NDArray[np.int64]:
        return self.blocks.block(shuffled(self._begin + index, len(self.blocks), self.seed))


class Concatenation:
    """Several domains end to end, each as often as it has blocks."""

    def __init__(self, parts: Sequence[Blocks]) -> None:
        self.parts = tuple(parts)
        self.block_size = parts[0].block_size

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def block(self, index: int) -> NDArray[np.int64]:
        for part in self.parts:
            if index < len(part):
                return part.block(index)
            index -= len(part)
        raise IndexError(index)


@dataclass(frozen=True)
class Position:
    """How far an order was followed: the next block to draw."""

    epoch: int = 0
    index: int = 0

    def advanced(self, count: int, epoch_size: int) -> Position:
        """Return the position `count` blocks further on."""
        epochs, index = divmod(self.index + count, epoch_size)
        return Position(self.epoch + epochs, index)


def draw(blocks: Blocks | BalancedUnion | SharedUnion, position: Position, seed: int) -> NDArray[np.int64]:
    """Return the block at a position of the order that `seed` gives: a pure function of its arguments."""
    if isinstance(blocks, SharedUnion):
        which, turn = blocks.part_at(position.epoch * len(blocks) + position.index)
        part = blocks.parts[which]
        epoch, index = divmod(turn, len(part))
        return draw(part, Position(epoch, index), seed + 1_000_003 * (which + 1))
    if isinstance(blocks, BalancedUnion):
        turn, which = divmod(position.epoch * len(blocks) + position.index, len(blocks.parts))
        part = blocks.parts[which]
        epoch, index = divmod(turn, len(part))
        return draw(part, Position(epoch, index), seed + 1_000_003 * (which + 1))
    return blocks.block(shuffled(position.index, len(blocks), seed * 1_000_033 + position.epoch))


def domain_at(blocks: Blocks | BalancedUnion | SharedUnion, position: Position) -> int:
    """Return which part of a union the block at a position is of; 0 where there is one."""
    if isinstance(blocks, SharedUnion):
        return blocks.part_at(position.epoch * len(blocks) + position.index)[0]
    if isinstance(blocks, BalancedUnion):
        return (position.epoch * len(blocks) + position.index) % len(blocks.parts)
    return 0


def shuffled(index: int, size: int, seed: int) -> int:
    """Return where `index` goes in the pseudo-random permutation of 0..size-1 that `seed` names.

    A four-round Feistel network over the next even power of two, walked until it lands inside: no table, so
    memory does not grow with the corpus.
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
    """Scramble 64 bits (the finaliser of MurmurHash3) so that each round looks random."""
    word = (value + 0x9E3779B97F4A7C15 * (seed * 4 + round_number + 1)) & 0xFFFFFFFFFFFFFFFF
    word = (word ^ (word >> 33)) * 0xFF51AFD7ED558CCD & 0xFFFFFFFFFFFFFFFF
    word = (word ^ (word >> 33)) * 0xC4CEB9FE1A85EC53 & 0xFFFFFFFFFFFFFFFF
    return word ^ (word >> 33)
