"""Lazy reading and streaming writing of safetensors checkpoints, with digests computed along the way.

A checkpoint is a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`, as
transformers writes them. Names, shapes and dtypes come from the headers; tensors are read on demand, and nothing
is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, unknown_name
from .files import os_errors_as_user_errors, read_json, replacement_file
from .numeric import DTYPES

if TYPE_CHECKING:
    from torch import Tensor, dtype

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHUNK_BYTES = 1 << 22
SPAN = 1 << 22
"""Elements of a tensor that `Checkpoint.spans` covers at a time."""
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own parser
MAX_DIMENSIONS = 16
"""Most dimensions of a tensor."""


@dataclass(frozen=True)
class TensorEntry:
    """Header entry of one tensor: name, dtype, shape and position in the file."""

    name: str
    dtype: str
    """safetensors' name: `F32`, `BF16`, `I64` ..."""
    shape: tuple[int, ...]
    file: Path
    begin: int
    """Offset of the first byte in the file."""
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    def read(self, begin: int = 0, end: int | None = None) -> bytearray:
        """Return the bytes `begin` to `end` of the tensor; raises `UserError` if the file ends before."""
        content = bytearray((self.num_bytes if end is None else end) - begin)
        with os_errors_as_user_errors(self.file), self.file.open("rb", buffering=0) as file:
            self._fill(memoryview(content), file.fileno(), begin)
        return content

    def pieces(self, descriptor: int, piece_bytes: int) -> Iterator[memoryview]:
        """Yield all bytes from an open file in pieces, each valid until the next one is requested."""
        buffer = memoryview(bytearray(min(piece_bytes, self.num_bytes)))
        with os_errors_as_user_errors(self.file):
            for begin in range(0, self.num_bytes, piece_bytes):
                piece = buffer[: self.num_bytes - begin]
                self._fill(piece, descriptor, begin)
                yield piece

    def has_same_bytes(self, other: TensorEntry) -> bool:
        """Return whether both tensors have the same dtype, shape and bytes; reads no further than the first difference."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        with (
            os_errors_as_user_errors(self.file),
            self.file.open("rb", buffering=0) as first,
            other.file.open("rb", buffering=0) as second,
        ):
            pieces = zip(
                self.pieces(first.fileno(), CHUNK_BYTES), other.pieces(second.fileno(), CHUNK_BYTES), strict=True
            )
            return all(left == right for left, right in pieces)

    def _fill(self, target: memoryview, descriptor: int, begin: int) -> None:
        filled = 0
        while filled < len(target):
            count = os.preadv(descriptor, [target[filled:]], self.begin + begin + filled)
            if not count:
                raise _damaged(self.file, f"it ends within tensor '{self.name}'")
            filled += count


def header_bytes(path: Path) -> int:
    """Return the size of a safetensors file's header as the file states it, without reading it; 0 for a shorter file."""
    with os_errors_as_user_errors(path), path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    return size if size <= path.stat().st_size else 0


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file in file order; raises `UserError` if it is truncated or not valid."""
    with os_errors_as_user_errors(path), path.open("rb") as file:
        size, prefix = path.stat().st_size, file.read(8)
        if len(prefix) < 8:
            raise _damaged(path, "it is too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(path, "its header is truncated, or it is not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):  # also: an oversized number, unbounded nesting
            raise _damaged(path, "its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    data_start = 8 + length
    entries = {
        name: _entry(name, record, path, data_start) for name, record in header.items() if name != "__metadata__"
    }
    expected = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != expected:
            raise _damaged(path, f"its header leaves a gap before tensor '{entry.name}'")
        expected = entry.end
    if expected != size:
        raise _damaged(path, f"it has {size:,} bytes, its header requires {expected:,}")
    return entries


def _entry(name: str, record: Any, path: Path, data_start: int) -> TensorEntry:
    """Parse one tensor's header record; raises `UserError` if it is invalid."""
    try:
        kind, shape, (begin, end) = record["dtype"], tuple(record["shape"]), record["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, "its header is not a safetensors header") from None
    if len(shape) > MAX_DIMENSIONS:  # also: the product of so many numbers takes minutes
        raise _damaged(path, f"tensor '{name:.80}' has {len(shape):,} dimensions")
    if not isinstance(kind, str) or any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise _damaged(path, f"the header entry of tensor '{name}' is invalid")
    if kind not in DTYPES:
        raise UserError(f"{path}: tensor '{name}' has unsupported dtype {kind}; supported: {', '.join(DTYPES)}")
    if end - begin != _num_bytes(kind, shape):
        raise _damaged(
            path, f"tensor '{name}' has {end - begin:,} bytes; {kind} {list(shape)} needs {_num_bytes(kind, shape):,}"
        )
    return TensorEntry(name, kind, shape, path, data_start + begin, data_start + end)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}; download or create it again")


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, sorted by name.

    Raises `UserError` if it has none; for pickled weights (`.bin` etc.), which are refused, the message says how to convert them.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if index.exists():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        for file in files:
            if not file.exists():
                raise UserError(f"{index} lists {file.name}, which does not exist; download the shard again")
        return files
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise UserError(
            f"{folder} has only pickled weights ({pickled[0]}), which are refused because loading them can run "
            "code; convert them to safetensors on a machine where that is safe: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise UserError(f"{folder} is not a checkpoint folder: it has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> file name; raises `UserError` for a file outside the index's folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise _damaged(index, "it has no 'weight_map'")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise _damaged(index, f"it places '{tensor}' in {file!r}, which is not a shard in the same folder")
    return weight_map


class Checkpoint:
    """The tensors of one or more safetensors files, read one at a time on demand."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise UserError(f"tensor '{name}' is in both {self.entries[name].file} and {file}")
                self.entries[name] = entry

    @classmethod
    def of_folder(cls, folder: Path) -> Checkpoint:
        """Open a checkpoint folder by its headers; raises `UserError` if it is incomplete or damaged."""
        checkpoint = cls(checkpoint_files(folder))
        if checkpoint.files != (folder / SINGLE_FILE,):
            for tensor, file in _weight_map(folder / INDEX_FILE).items():
                if tensor not in checkpoint or checkpoint.entries[tensor].file.name != file:
                    raise _damaged(folder, f"{INDEX_FILE} places '{tensor}' in {file}, which does not hold it")
        return checkpoint

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise unknown_name("tensor", name, self.entries, listed_as="the checkpoint has")
        return self.entries[name]

    def read(self, name: str) -> Tensor:
        """Return one tensor in newly allocated memory."""
        entry = self.entry(name)
        return _as_tensor(entry.read(), entry.dtype).reshape(entry.shape)

    def span(self, name: str, begin: int, end: int) -> Tensor:
        """Return the elements `begin` to `end` of one tensor in row-major order, shape (end - begin,)."""
        entry = self.entry(name)
        width = DTYPES[entry.dtype].num_bytes
        return _as_tensor(entry.read(begin * width, end * width), entry.dtype)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of one tensor in chunks; each chunk is valid until the next one is requested."""
        entry = self.entry(name)
        with os_errors_as_user_errors(entry.file), entry.file.open("rb", buffering=0) as file:
            yield from entry.pieces(file.fileno(), CHUNK_BYTES)

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of each tensor, by name, as `new_file` takes them."""
        return {name: (entry.dtype, entry.shape) for name, entry in self.entries.items()}

    def spans(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield ranges [begin, end) of at most `SPAN` elements that cover a tensor."""
        count = math.prod(self.entry(name).shape)
        for begin in range(0, count, SPAN):
            yield begin, min(begin + SPAN, count)

    def digest(self, name: str) -> str:
        """Return the digest of one tensor: sha256 over dtype, shape and bytes, independent of the file."""
        entry = self.entry(name)
        state = digest_start(entry.dtype, entry.shape)
        for chunk in self.chunks(name):
            state.update(chunk)
        return state.hexdigest()

    def digests(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Return the digests of the named tensors (default: all), sorted by name, computed by two threads."""
        ordered_names = sorted(self.entries if names is None else names)
        if sum(self.entry(name).num_bytes for name in ordered_names) < CHUNK_BYTES:  # starting threads takes longer
            return {name: self.digest(name) for name in ordered_names}
        with ThreadPoolExecutor(max_workers=2) as pool:  # hashing and reading release the interpreter lock
            return dict(zip(ordered_names, pool.map(self.digest, ordered_names), strict=True))


def _as_tensor(content: bytearray, dtype: str) -> Tensor:
    """Return the flat tensor that shares the memory of its bytes."""
    import torch

    kind = torch_dtype(dtype)
    return torch.frombuffer(content, dtype=torch.uint8).view(kind) if content else torch.empty(0, dtype=kind)


def tensor_digest(tensor: Tensor) -> str:
    """Return the digest of a tensor in memory, equal to that of the same tensor in a file."""
    state = digest_start(dtype_name(tensor.dtype), tuple(tensor.shape))
    state.update(tensor_bytes(tensor))
    return state.hexdigest()


def digest_start(dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    """Return the initial hash state of a tensor, to be updated with its bytes in order."""
    return hashlib.sha256(f"{dtype}:{','.join(map(str, shape))}:".encode())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as stored in a file (row-major, little-endian)."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def header_of_file(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the header bytes of a safetensors file and the (begin, end) file offsets of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (kind, shape) in shapes.items():
        num_bytes = _num_bytes(kind, shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    begin = 8 + len(encoded)
    offsets = {name: header[name]["data_offsets"] for name in shapes}
    spans = {name: (begin + first, begin + last) for name, (first, last) in offsets.items()}
    return struct.pack("<Q", len(encoded)) + encoded, spans


class TensorWriter:
    """Writes the bytes of one tensor in order, at its place in an open file, and hashes them unless `digest` is given."""

    def __init__(
        self,
        descriptor: int,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        span: tuple[int, int],
        digest: str | None = None,
    ) -> None:
        self.descriptor, self.name, self.dtype = descriptor, name, dtype
        self._position, self._end = span
        self._digest, self._state = digest, digest_start(dtype, shape)

    def write(self, content: Any) -> int:
        """Write the bytes of any buffer and return their number."""
        view = memoryview(content)
        assert self._position + len(view) <= self._end, f"{self.name} has more elements than announced"
        write_at(self.descriptor, view, self._position)
        if self._digest is None:
            self._state.update(view)
        self._position += len(view)
        return len(view)

    def digest(self) -> str:
        """Return the digest of the complete tensor."""
        assert self._position == self._end, f"{self.name} has fewer elements than announced"
        return self._digest or self._state.hexdigest()


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all bytes at an offset of a file."""
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], offset + written)


class FileWriter:
    """Writes the tensors of an open safetensors file piece by piece, interleaved in any order; see `new_file`."""

    def __init__(self, tensors: Mapping[str, TensorWriter]) -> None:
        self._tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def add(self, name: str, piece: Tensor) -> None:
        """Write the next elements of a tensor, in row-major order."""
        writer, dtype = self._tensors[name], dtype_name(piece.dtype)
        assert dtype == writer.dtype, f"announced {writer.dtype} for {name}, got {dtype}"
        writer.write(tensor_bytes(piece))

    def digests(self) -> dict[str, str]:
        """Return the digests of all tensors, by name, in file order; they must be complete."""
        return {name: writer.digest() for name, writer in self._tensors.items()}


@contextmanager
def new_file(path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[FileWriter]:
    """Yield a writer of a file that appears on success; `shapes` maps the tensors, in file order, to (dtype, shape)."""
    header, spans = header_of_file(shapes)
    with replacement_file(path) as file:
        write_at(file.fileno(), memoryview(header), 0)
        writer = FileWriter(
            {
                name: TensorWriter(file.fileno(), name, dtype, tuple(shape), spans[name])
                for name, (dtype, shape) in shapes.items()
            }
        )
        yield writer
        writer.digests()  # raises for a tensor that is not complete


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors into one safetensors file, sorted by name; return their digests."""
    names = sorted(tensors)
    with new_file(
        path, {name: (dtype_name(tensors[name].dtype), tuple(tensors[name].shape)) for name in names}
    ) as file:
        for name in names:
            file.add(name, tensors[name])
    return file.digests()


def _num_bytes(kind: str, shape: tuple[int, ...]) -> int:
    return DTYPES[kind].num_bytes * math.prod(shape)


def torch_dtype(name: str) -> dtype:
    """Return torch's dtype for a safetensors dtype name."""
    import torch

    if name not in DTYPES:
        raise unknown_name("tensor dtype", name, DTYPES)
    kind: torch.dtype = getattr(torch, DTYPES[name].torch)
    return kind


def dtype_name(kind: dtype) -> str:
    """Return safetensors' name of a torch dtype."""
    name = next((name for name, row in DTYPES.items() if str(kind) == f"torch.{row.torch}"), None)
    if name is None:
        raise UserError(f"tensors of dtype {kind} cannot be written to safetensors")
    return name


def stored_dtype(folder: Path) -> dtype:
    """Return the torch dtype of a checkpoint's first floating-point tensor."""
    entries = Checkpoint(checkpoint_files(folder)).entries.values()
    return torch_dtype(next(entry.dtype for entry in entries if entry.dtype.startswith(("F", "BF"))))
