"""Chunked file transfer: parts in any order, repeated attempts, and digest checks."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertctl import UserError
from expertctl.experts.federation.protocol.parts import FileParts, PartsWriter, parts_of, read_part


@given(st.binary(max_size=300), st.integers(1, 64), st.randoms())
@settings(max_examples=40, deadline=None)
def test_parts_in_any_order_restore_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int, source: object
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "from").mkdir()
    path = folder / "from" / "x.bin"
    path.write_bytes(data)
    parts = parts_of(path, size)
    assert parts.sha256 == hashlib.sha256(data).hexdigest()
    assert FileParts.of_json(parts.as_json()) == parts
    order = list(range(len(parts.parts)))
    source.shuffle(order)  # type: ignore[attr-defined]
    for count, index in enumerate(order):
        writer = PartsWriter(folder / "to", parts)  # a new one each time: all it knows is on the disk
        assert len(writer.missing()) == len(order) - count
        writer.put(index, read_part(path, parts, index))
        writer.put(index, read_part(path, parts, index))
    assert PartsWriter(folder / "to", parts).finish().read_bytes() == data
    assert PartsWriter(folder / "to", parts).missing() == []
    assert [path.name for path in (folder / "to").iterdir()] == ["x.bin"]


@pytest.fixture
def parts(tmp_path: Path) -> FileParts:
    (tmp_path / "x.bin").write_bytes(bytes(range(100)))
    return parts_of(tmp_path / "x.bin", 40)


def test_wrong_bytes_are_refused_and_earlier_parts_stay(tmp_path: Path, parts: FileParts) -> None:
    writer = PartsWriter(tmp_path / "to", parts)
    writer.put(0, bytes(range(40)))
    for index, data in ((1, bytes(40)), (1, b""), (2, bytes(range(40)))):
        with pytest.raises(UserError, match="does not match its announced digest"):
            writer.put(index, data)
    with pytest.raises(UserError, match="has 3 parts; there is no part 3"):
        writer.put(3, b"")
    with pytest.raises(UserError, match=r"2 of 3 parts of x\.bin are missing"):
        writer.finish()
    assert writer.missing() == [1, 2]


def test_a_file_changed_during_the_transfer_is_detected(tmp_path: Path, parts: FileParts) -> None:
    writer = PartsWriter(tmp_path / "to", parts)
    for index in range(3):
        writer.put(index, read_part(tmp_path / "x.bin", parts, index))
    (tmp_path / "to" / ".x.bin.parts").write_bytes(bytes(100))
    with pytest.raises(UserError, match="does not match its announced digest; send it again"):
        writer.finish()
    assert writer.missing() == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x"},
        {"name": ""},
        {"name": ".hidden"},
        {"name": "a/b"},
        {"size": -1},
        {"size": 1000},
        {"sha256": "0"},
        {"parts": ["zz"] * 3},
        {"part_size": 0},
        {"parts": None},
    ],
)
def test_invalid_file_entries_are_refused(parts: FileParts, change: dict[str, object]) -> None:
    with pytest.raises(UserError):
        FileParts.of_json({**parts.as_json(), **change})


def test_a_full_disk_is_a_one_line_error_and_keeps_arrived_parts(tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk; it raises the same kind of error."""
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(range(256)) * 400)
    program = f"""
import resource, signal, sys
from pathlib import Path
from expertctl import UserError
from expertctl.experts.federation.protocol.parts import PartsWriter, parts_of, read_part
path = Path({str(path)!r})
parts = parts_of(path, 25600)
writer = PartsWriter(path.parent / "to", parts)
writer.put(0, read_part(path, parts, 0))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))
writer.put(1, read_part(path, parts, 1))
try:
    writer.put(2, read_part(path, parts, 2))
except UserError as error:
    print(error)
print(writer.missing())
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "no space left while writing" in told
    assert told.splitlines()[-1] == "[2, 3]"
    parts = parts_of(path, 25600)
    writer = PartsWriter(tmp_path / "to", parts)
    for index in writer.missing():
        writer.put(index, read_part(path, parts, index))
    assert writer.finish().read_bytes() == path.read_bytes()


def test_a_list_of_half_a_million_wrong_digests_is_refused_at_the_first() -> None:
    """An error for each of them would take a gigabyte."""
    content = {"name": "x", "size": 1, "sha256": "a" * 64, "parts": [1] * 500_000, "part_size": 1}
    tracemalloc.start()
    with pytest.raises(UserError, match="the field 'parts'"):
        FileParts.of_json(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
