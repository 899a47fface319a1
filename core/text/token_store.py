"""Tokenised text on disk: memory-mapped shards, read as fixed-size blocks, and as windows for evaluation.

A part (`train`, `valid` or `test`) of a domain is one stream of tokens: a separator, then every document followed by
a separator; if the tokenizer begins texts with a token of its own, so does every document. Block `i` of size S covers tokens `i*S` to `i*S + S` inclusive; its last token is also the first token
of block `i + 1`. Inputs are all tokens but the last, targets all but the first, so every token is predicted once.
Windows, for evaluation, overlap: each scores only the tokens that no window before it has scored.
A part of conversations has no separators: it stores beside the tokens which of them count, and where each conversation
begins (`conversation_blocks.py`).
"""

from __future__ import annotations

import hashlib
import sys
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
TOKENS, COUNTED, ENDS = "tokens", "counted", "ends"
"""Names of shards: token ids, whether each counts (uint8), and the number of tokens up to the end of each conversation."""


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
    """UTF-8 bytes of the documents' text that counts, the denominator of bits per byte."""
    digest: str
    """sha256 over the documents' texts in order, and over what of them counts."""
    markers: tuple[int, ...] = ()
    """Ids of the tokens that stand for no text, the separator first: those between documents, or special tokens."""
    lost_bytes: int = 0
    """Bytes of the documents that their tokens do not give back: unknown tokens, and changes by the tokenizer."""
    counted_tokens: int | None = None
    """Number of tokens that count towards the loss, in a part of conversations; None: text, of which all count."""
    has_pairs: bool = False
    """Whether each document is a pair of conversations, the better one first; all counts are of that one."""
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
    counted: Sequence[bool] | None = None
    """For a conversation, which tokens count towards the loss."""
    counted_text: str | None = None
    """For a conversation, the text that counts."""
    is_rejected: bool = False
    """Whether it is the worse conversation of a pair, and the document before it the better one."""


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
    with _ShardWriter(folder, TOKENS, dtype, shard_tokens) as shards:
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


def write_conversations(
    folder: Path,
    conversations: Iterable[EncodedDocument],
    *,
    markers: Sequence[int],
    vocabulary: int,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenPart:
    """Stream conversations into shards in the existing `folder`, in constant memory.

    `markers` are the ids of tokens that stand for no text, the separator first.
    """
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    counter = TextCounter()
    lost_bytes = counted_bytes = counted_tokens = end = 0
    has_pairs = False
    with (
        _ShardWriter(folder, TOKENS, dtype, shard_tokens) as shards,
        _ShardWriter(folder, COUNTED, "uint8", shard_tokens) as counts,
        _ShardWriter(folder, ENDS, "uint64", sys.maxsize) as ends,
    ):
        for document in conversations:
            assert document.counted is not None, "a conversation says what counts"
            assert document.counted_text is not None, "a conversation says what counts"
            shards.add(document.ids)
            counts.add(document.counted)
            end += len(document.ids)
            ends.add([end])
            counter.add(document.text, is_rejected=document.is_rejected)
            counter.add_marks(document.counted)
            if document.is_rejected:
                has_pairs = True
                continue
            lost_bytes += document.lost_bytes
            counted_tokens += sum(document.counted)
            counted_bytes += len(document.counted_text.encode("utf-8", errors="surrogatepass"))
    sizes = tuple(shards.sizes)
    part = TokenPart(
        dtype,
        sizes,
        counter.documents,
        sum(sizes),
        counted_bytes,
        counter.digest,
        tuple(markers),
        lost_bytes=lost_bytes,
        counted_tokens=counted_tokens,
        has_pairs=has_pairs,
    )
    write_json(folder / PART_FILE, asdict(part))
    return part


class TextCounter:
    """Counts documents and their bytes, and computes the digest of their texts in order."""

    def __init__(self) -> None:
        self.documents = self.bytes = 0
        self._state = hashlib.sha256()

    def add(self, text: str, *, is_rejected: bool = False) -> None:
        """Count a document; the worse conversation of a pair is part of the digest only."""
        encoded = text.encode("utf-8", errors="surrogatepass")
        self._state.update(len(encoded).to_bytes(8, "little") + encoded)
        if not is_rejected:
            self.documents += 1
            self.bytes += len(encoded)

    def add_marks(self, counted: Sequence[bool]) -> None:
        """Let the digest depend on which tokens of the last document count."""
        self._state.update(bytes(counted))

    @property
    def digest(self) -> str:
        """sha256 over the lengths and texts of all documents."""
        return self._state.hexdigest()


def shard_path(folder: Path, name: str, number: int) -> Path:
    """Return the path of a shard of a part's tokens, or of what is stored beside them."""
    return folder / f"{name}-{number:05d}.bin"


class _ShardWriter:
    """Appends numbers to numbered shards; starts a new shard at the next document once one is full."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int) -> None:
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
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
        return shard_path(self._folder, self._name, len(self.sizes) - 1).open("wb")


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
            self._require_size(TOKENS, index, count * (2 if self.part.dtype == "uint16" else 4))
            if self.has_conversations:
                self._require_size(COUNTED, index, count)
        if self.has_conversations:
            self._require_size(ENDS, 0, 8 * self.part.documents * (2 if self.part.has_pairs else 1))

    def _require_size(self, name: str, index: int, expected: int) -> None:
        path = shard_path(self.folder, name, index)
        if not path.exists() or path.stat().st_size != expected:
            raise UserError(f"{path} is damaged; delete {self.folder} and run `expertctl data prepare` again")

    @property
    def has_conversations(self) -> bool:
        """Whether the part holds conversations, of which only some tokens count."""
        return self.part.counted_tokens is not None

    @cached_property
    def _shards(self) -> list[NDArray[np.generic]]:
        return self._open(TOKENS, self.part.dtype)

    @cached_property
    def _counted(self) -> list[NDArray[np.generic]]:
        return self._open(COUNTED, "uint8")

    def _open(self, name: str, dtype: str) -> list[NDArray[np.generic]]:
        import numpy as np

        return [
            np.memmap(shard_path(self.folder, name, index), dtype=dtype, mode="r")
            if count
            else np.empty(0, dtype=dtype)
            for index, count in enumerate(self.part.shard_tokens)
        ]

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Number of tokens up to the end of each conversation, (documents,)."""
        import numpy as np

        return np.fromfile(shard_path(self.folder, ENDS, 0), dtype="uint64").astype(np.int64)

    def __len__(self) -> int:
        return self.part.tokens

    def read(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return tokens `begin` to `end` (clipped to the stream) as int64, across shards."""
        import numpy as np

        return self._read(self._shards, begin, end).astype(np.int64)

    def counted(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Return whether each of those tokens of conversations counts."""
        return self._read(self._counted, begin, end).astype(bool)

    def _read(self, shards: Sequence[NDArray[np.generic]], begin: int, end: int) -> NDArray[np.generic]:
        import numpy as np

        pieces = []
        offset = 0
        for shard, count in zip(shards, self.part.shard_tokens, strict=True):
            if begin < offset + count and end > offset:
                pieces.append(shard[max(begin - offset, 0) : end - offset])
            offset += count
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Row:
    """A block of S predicted tokens, with what is known of each."""

    tokens: NDArray[np.int64]
    """Token ids, (S + 1,)."""
    counted: NDArray[np.bool_] | None = None
    """Whether each counts towards the loss as a target, (S + 1,); the first never does. None: all others count."""
    positions: NDArray[np.int64] | None = None
    """Position of each in its own document, (S + 1,), where the documents of a block are to be kept apart."""


class Blocks(Protocol):
    """A training data source: numbered blocks of one size."""

    block_size: int

    def __len__(self) -> int: ...
    def row(self, index: int) -> Row:
        """Return block `index`."""
        ...


@dataclass(frozen=True)
class Windows:
    """Windows of equal length with the targets that they score."""

    tokens: NDArray[np.int64]
    """Token ids, (B, T + 1); targets are all but the first of a row."""
    scored: NDArray[np.bool_]
    """Whether a target counts, (B, T): it is new in its window, and text rather than the boundary of documents."""


def stacked(windows: Iterable[Windows]) -> Windows:
    """Return the rows of windows of one length together."""
    import numpy as np

    rows = list(windows)
    return Windows(np.concatenate([row.tokens for row in rows]), np.concatenate([row.scored for row in rows]))


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
        """Return the tokens of block `index`: block_size + 1 (fewer for a partial block at the end)."""
        begin = index * self.block_size
        return self.store.read(begin, begin + self.block_size + 1)

    def row(self, index: int) -> Row:
        """Return block `index`."""
        return Row(self.block(index))

    def window(self, index: int) -> Windows:
        """Return block `index` with the targets that count, as one row."""
        import numpy as np

        tokens = self.block(index)[None]
        return Windows(tokens, np.ones(tokens[:, 1:].shape, dtype=bool))

    def windows(self, batch_size: int, *, limit: int | None = None) -> Iterator[Windows]:
        """Yield every token once, in order, in rows of block_size + 1, a partial block last; stop after `limit` blocks."""
        full = len(self) if limit is None else min(limit, len(self))
        for first in range(0, full, batch_size):
            yield stacked(self.window(index) for index in range(first, min(first + batch_size, full)))
        if full == len(self) and self.num_targets > full * self.block_size and (limit is None or not full):
            yield self.window(full)


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


def spread(blocks: TokenBlocks, count: int) -> Iterator[NDArray[np.int64]]:
    """Yield up to `count` evenly spaced blocks (neighbours share a document); of a short text, one short block."""
    return (blocks.block(index) for index in spread_indices(blocks, count))


def spread_indices(blocks: TokenBlocks, count: int) -> list[int]:
    """Return the indices of up to `count` evenly spaced blocks."""
    available = max(len(blocks), 1)
    count = min(count, available)
    return [index * available // count for index in range(count)]
