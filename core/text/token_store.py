"""Tokenised text on disk: memory-mapped shards, read as fixed-size blocks in a pseudo-random order.

A part (`train`, `valid` or `test`) of a domain is one stream of tokens: a separator, then every document followed by
a separator; if the tokenizer begins texts with a token of its own, so does every document. Block `i` of size S covers tokens `i*S` to `i*S + S` inclusive; its last token is also the first token
of block `i + 1`. Inputs are all tokens but the last, targets all but the first, so every token is predicted once.
Windows, for evaluation, overlap: each scores only the tokens that no window before it has scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, Self

from ..artefacts.files import os_errors_as_user_errors, read_json, write_json
from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = 2
PART_FILE = "part.json"
SHARD_TOKENS = 1 << 26


@dataclass(frozen=True)
class TokenPart:
    """Description of one tokenised part, stored as `part.json` beside its shards."""

    dtype: str
    """`uint16` or `uint32`, little-endian."""
    shard_tokens: tuple[int, ...]
    documents: int
    tokens: int
    """Number of tokens, including separators."""
    bytes: int
    """UTF-8 bytes of the documents' text, the denominator of bits per byte."""
    digest: str
    """sha256 over the documents' texts in order."""
    markers: tuple[int, ...] = ()
    """Ids of the tokens between documents, which stand for no text: the separator and the token before a document."""
    lost_bytes: int = 0
    """Bytes of the documents that their tokens do not give back: unknown tokens, and changes by the tokenizer."""
    format: int = FORMAT

    @property
    def coverage(self) -> float:
        """Share of the bytes that the tokens give back."""
        return 1 - self.lost_bytes / self.bytes if self.bytes else 1.0


@dataclass(frozen=True)
class EncodedDocument:
    """A document and its token ids."""

    text: str
    ids: Sequence[int]
    lost_bytes: int = 0
    """Bytes of the text that the tokens do not give back."""


def write_part(
    folder: Path,
    documents: Iterable[EncodedDocument],
    *,
    separator: int,
    vocabulary: int,
    begin: Sequence[int] = (),
    shard_tokens: int = SHARD_TOKENS,
) -> TokenPart:
    """Stream documents into shards in the existing `folder`, in constant memory; `begin` are the ids before each."""
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    counter = TextCounter()
    lost_bytes = 0
    with _ShardWriter(folder, dtype, shard_tokens) as shards:
        shards.add([separator])
        for document in documents:
            shards.add([*begin, *document.ids, separator])
            counter.add(document.text)
            lost_bytes += document.lost_bytes
    sizes, markers = tuple(shards.sizes), (separator, *begin)
    part = TokenPart(
        dtype, sizes, counter.documents, sum(sizes), counter.bytes, counter.digest, markers, lost_bytes=lost_bytes
    )
    write_json(folder / PART_FILE, asdict(part))
    return part


class TextCounter:
    """Counts documents and their bytes, and computes the digest of their texts in order."""

    def __init__(self) -> None:
        self.documents = self.bytes = 0
        self._state = hashlib.sha256()

    def add(self, text: str) -> None:
        """Count a document."""
        encoded = text.encode("utf-8", errors="surrogatepass")
        self._state.update(len(encoded).to_bytes(8, "little") + encoded)
        self.documents += 1
        self.bytes += len(encoded)

    @property
    def digest(self) -> str:
        """sha256 over the lengths and texts of all documents."""
        return self._state.hexdigest()


class _ShardWriter:
    """Appends tokens to numbered shards; starts a new shard at the next document once one is full."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int) -> None:
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self.sizes = [0]
        with os_errors_as_user_errors(folder):
            self._file = self._open_shard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with os_errors_as_user_errors(self._folder):
            self._file.close()

    def add(self, ids: Sequence[int]) -> None:
        import numpy as np

        with os_errors_as_user_errors(self._folder):
            if self.sizes[-1] >= self._shard_tokens:
                self._file.close()
                self.sizes.append(0)
                self._file = self._open_shard()
            self._file.write(np.array(ids, dtype=self._dtype).tobytes())
        self.sizes[-1] += len(ids)

    def _open_shard(self) -> BinaryIO:
        return (self._folder / f"tokens-{len(self.sizes) - 1:05d}.bin").open("wb")


class TokenStore:
    """One tokenised part, memory-mapped; opening it reads no tokens. Raises `UserError` if it is damaged."""

    def __init__(self, folder: Path) -> None:
        content = read_json(folder / PART_FILE)
        try:
            lists = {key: tuple(content[key]) for key in ("shard_tokens", "markers")}
            self.part = TokenPart(**{**content, **lists})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder / PART_FILE} is damaged ({error}); delete {folder} and run `expertctl data prepare` again"
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
        """Return tokens `begin` to `end` (clipped to the stream) as int64, across shards."""
        import numpy as np

        pieces = []
        offset = 0
        for shard, count in zip(self._shards, self.part.shard_tokens, strict=True):
            if begin < offset + count and end > offset:
                pieces.append(shard[max(begin - offset, 0) : end - offset])
            offset += count
        return np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, dtype=np.int64)


class Blocks(Protocol):
    """A training data source: numbered blocks of one size."""

    block_size: int

    def __len__(self) -> int: ...
    def block(self, index: int) -> NDArray[np.int64]: ...


class TokenBlocks:
    """The blocks of one part, in stream order."""

    def __init__(self, store: TokenStore, block_size: int) -> None:
        self.store = store
        self.block_size = block_size

    def __len__(self) -> int:
        """Return the number of full blocks."""
        return (len(self.store) - 1) // self.block_size

    @property
    def num_targets(self) -> int:
        """Number of predicted tokens: all but the leading separator."""
        return len(self.store) - 1

    @property
    def num_bytes(self) -> int:
        return self.store.part.bytes

    def block(self, index: int) -> NDArray[np.int64]:
        """Return block `index`: block_size + 1 tokens (fewer for a partial block at the end)."""
        begin = index * self.block_size
        return self.store.read(begin, begin + self.block_size + 1)

    def batches(self, batch_size: int, *, limit: int | None = None) -> Iterator[NDArray[np.int64]]:
        """Yield every token once, in order, as (B, block_size + 1), a partial block last; stop after `limit` blocks."""
        import numpy as np

        full = len(self) if limit is None else min(limit, len(self))
        for first in range(0, full, batch_size):
            yield np.stack([self.block(index) for index in range(first, min(first + batch_size, full))])
        if full == len(self) and self.num_targets > full * self.block_size and (limit is None or not full):
            yield self.block(full)[None, :]


@dataclass(frozen=True)
class Windows:
    """Windows of equal length with the targets that they score."""

    tokens: NDArray[np.int64]
    """Token ids, (B, T + 1); targets are all but the first of a row."""
    scored: NDArray[np.bool_]
    """Whether a target counts, (B, T): it is new in its window, and text rather than the boundary of documents."""


class TokenWindows:
    """A part as overlapping windows, in which every token of its text is scored once, with context before it."""

    def __init__(self, store: TokenStore, context: int, stride: int) -> None:
        """Cut windows of at most `context` inputs; each begins `stride` tokens after the one before it.

        Every scored token but those of the first window has at least `context - stride` tokens before it.
        """
        self.store = store
        self.num_targets = len(store) - 1
        self.context = max(min(context, self.num_targets), 1)
        self.stride = min(stride, self.context)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents."""
        return self.store.part.bytes

    @property
    def lost_bytes(self) -> int:
        """Bytes that the tokens do not give back."""
        return self.store.part.lost_bytes

    def __len__(self) -> int:
        """Return the number of windows."""
        return 1 + -(-max(self.num_targets - self.context, 0) // self.stride)

    def batches(self, batch_size: int, begin: int = 0, end: int | None = None) -> Iterator[Windows]:
        """Yield all windows in order, at most `batch_size` at once; the last one ends with the text.

        `begin` and `end` are the numbers of the first batch to yield, and of the one after the last.
        """
        for first in range(0, len(self), batch_size)[begin:end]:
            yield self._windows(range(first, min(first + batch_size, len(self))))

    def _windows(self, numbers: range) -> Windows:
        import numpy as np

        begins = [min(number * self.stride, self.num_targets - self.context) for number in numbers]
        # a window's targets end at begin + context; those before the end of the window before it are scored already
        ends = [(number - 1) * self.stride + self.context if number else 0 for number in numbers]
        tokens = np.stack([self.store.read(begin, begin + self.context + 1) for begin in begins])
        targets = np.arange(self.context)[None, :] + np.array(begins)[:, None]
        is_new = targets >= np.array(ends)[:, None]
        return Windows(tokens, is_new & ~np.isin(tokens[:, 1:], self.store.part.markers))


def spread(blocks: Blocks, count: int) -> Iterator[NDArray[np.int64]]:
    """Yield up to `count` evenly spaced blocks (neighbours share a document); of a short text, one short block."""
    available = max(len(blocks), 1)
    count = min(count, available)
    return (blocks.block(index * available // count) for index in range(count))


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

    def block(self, index: int) -> NDArray[np.int64]:
        return self.blocks.block(shuffled(self._begin + index, len(self.blocks), self.seed))


class Concatenation:
    """Concatenation of several domains, each represented in proportion to its number of blocks."""

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
    """Position in the data order: the next block to draw."""

    epoch: int = 0
    index: int = 0

    def advanced(self, count: int, epoch_size: int) -> Position:
        """Return the position `count` blocks later."""
        epochs, index = divmod(self.index + count, epoch_size)
        return Position(self.epoch + epochs, index)


def draw(blocks: Blocks | BalancedUnion, position: Position, seed: int) -> NDArray[np.int64]:
    """Return the block at a position of the order given by `seed`, a pure function of its arguments."""
    if isinstance(blocks, BalancedUnion):
        part_index, part_number = blocks.part_at(position)
        part = blocks.parts[part_index]
        epoch, index = divmod(part_number, len(part))
        return draw(part, Position(epoch, index), seed + 1_000_003 * (part_index + 1))
    return blocks.block(shuffled(position.index, len(blocks), seed * 1_000_033 + position.epoch))


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
