"""Packs and deliveries as files: nothing but plain files of the announced size is read."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from federation_messages import REQUEST, SIGNED

from expertctl import UserError
from expertctl.core.artefacts.files import write_json
from expertctl.experts.federation.packs import open_pack, read_request
from expertctl.experts.federation.protocol.delivery import SignedStatement


def sparse(path: Path) -> None:
    """Write an archive of 1.5 kB with a file that claims 3 GB."""
    header = tarfile.TarInfo("seed/model.safetensors")
    header.size = 512
    header.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "seed/model.safetensors",
        "GNU.sparse.realsize": str(3 << 30),
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(header, io.BytesIO(f"1\n{3 << 30}\n0\n".encode().ljust(512, b"\0")))


def larger_than_itself(path: Path) -> None:
    header = tarfile.TarInfo("seed/model.safetensors")
    header.size = 3 << 30
    path.write_bytes(header.tobuf() + bytes(1024))


def pipe(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        header = tarfile.TarInfo("request.json")
        header.type = tarfile.FIFOTYPE
        archive.addfile(header)


def escaping(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        header = tarfile.TarInfo("../outside")
        header.size = 1
        archive.addfile(header, io.BytesIO(b"x"))


def long_names(path: Path) -> None:
    """Write an archive with thousands of headers in front of each other, each of which `tarfile` would follow."""
    header = tarfile.TarInfo("x" * 200)
    longname = header.tobuf(tarfile.GNU_FORMAT)[: 2 * tarfile.BLOCKSIZE]
    path.write_bytes(longname * 5000 + tarfile.TarInfo("request.json").tobuf() + bytes(1024))


def huge_header(path: Path) -> None:
    """Write an archive of a few bytes on disk with an extended header of 1.5 GB."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 3 << 29
    path.write_bytes(header.tobuf())
    os.truncate(path, 3 << 29)


def deep(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("/".join("x" * 40)))


@pytest.mark.parametrize("write", [sparse, larger_than_itself, pipe, escaping, long_names, huge_header, deep])
def test_a_hostile_archive_writes_nothing(tmp_path: Path, write: object) -> None:
    path, state = tmp_path / "pack.tar", tmp_path / "state"
    write(path)  # type: ignore[operator]
    with pytest.raises(UserError), open_pack(path, state):
        pass
    assert sorted(state.iterdir()) == []
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("name", ["request.json", "delivery.json"])
def test_a_pipe_or_a_link_in_a_folder_is_not_read(tmp_path: Path, name: str) -> None:
    read = read_request if name == "request.json" else SignedStatement.read
    (tmp_path / "real").mkdir()
    write_json(tmp_path / "real" / name, (REQUEST if name == "request.json" else SIGNED).as_json())
    assert read(tmp_path / "real")
    for number, make in enumerate((os.mkfifo, lambda path: path.symlink_to(tmp_path / "real" / name))):
        folder = tmp_path / f"folder-{number}"
        folder.mkdir()
        make(folder / name)
        with pytest.raises(UserError):
            read(folder)


def test_a_large_request_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"a": "' + "x" * (5 << 20) + '"}')
    with pytest.raises(UserError, match="is larger than"):
        read_request(tmp_path)
