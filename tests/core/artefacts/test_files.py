"""Writing so that nothing half-done is left, whatever goes wrong: errors, full disks, kills, other processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from expertctl.core.artefacts import files
from expertctl.core.artefacts.files import (
    DISCARDED_MARK,
    clear_leftovers,
    exclusive,
    is_alive,
    link_or_copy,
    new_folder,
    os_errors_as_user_errors,
    partial_sibling,
    read_json,
    refuse_existing,
    remove_tree,
    resumable_folder,
    write_json,
    write_text,
)
from expertctl.core.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusing(error: int) -> Any:
    """Stand in for a call of the operating system that refuses."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return refuse


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is written go to /dev/full, which has never room: a real ENOSPC from the kernel."""

    def on_full_disk(path: Path) -> Path:
        partial = partial_sibling(path)
        partial.symlink_to("/dev/full")
        return partial

    monkeypatch.setattr("expertctl.core.artefacts.files.partial_sibling", on_full_disk)


# --- one file ---


def test_json_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    content = {"b": 1, "a": ["größe", None, 1e-3], "c": {"x": True}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == ["b", "a", "c"]
    assert "größe" in text
    assert text.endswith("}\n")
    assert names(tmp_path) == ["x.json"]


def test_an_open_reader_keeps_the_old_file(tmp_path: Path) -> None:
    """Replaced by a rename, never written into."""
    write_text(tmp_path / "x.txt", "old")
    with (tmp_path / "x.txt").open() as reader:
        write_text(tmp_path / "x.txt", "new")
        assert reader.read() == "old"
    assert (tmp_path / "x.txt").read_text() == "new"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff{}", b"[1]", b"1", b"1" * 5000, b"[" * 100_000])
def test_json_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json (is damaged|should hold a JSON object)"):
        read_json(path)


def test_json_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.json does not exist"):
        read_json(tmp_path / "x.json")


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path, full_disk: None) -> None:
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(UserError, match=r"no space left while writing .*x\.txt.*; free some"):
        write_text(tmp_path / "x.txt", "new" * 10_000)
    assert (tmp_path / "x.txt").read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_weights_that_find_no_room_leave_the_old_ones_and_nothing_else(tmp_path: Path, full_disk: None) -> None:
    import torch

    from expertctl.core.artefacts.safetensors_io import write_tensors

    (tmp_path / "model.safetensors").write_text("old")
    with pytest.raises(UserError, match=r"no space left while writing .*model\.safetensors"):
        write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(50_000)})
    assert (tmp_path / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errno.ENOSPC, "no space left while writing"),
        (errno.EDQUOT, "no space left while writing"),
        (errno.EROFS, "no permission to access .*check the folder's owner"),
        (errno.EACCES, "no permission to access"),
        (errno.EPERM, "no permission to access"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_refusal_by_the_operating_system_is_one_line(tmp_path: Path, error: int, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught, os_errors_as_user_errors(tmp_path / "x"):
        refusing(error)()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """The calls are made to refuse, since tests may run as root, whom no mode bits stop."""
    monkeypatch.setattr(Path, "mkdir", refusing(error))
    monkeypatch.setattr(os, "open", refusing(error))
    with pytest.raises(UserError, match="no permission to access"), new_folder(tmp_path / "x"):
        pass
    with pytest.raises(UserError, match="no permission to access"):
        write_text(tmp_path / "x", "")
    with pytest.raises(UserError, match="no permission to access"), exclusive(tmp_path / "locks" / "x", "it"):
        pass
    monkeypatch.undo()
    assert names(tmp_path) == []


# --- folders ---


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x"
    with new_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
        assert partial.name.startswith(".")
    assert names(target) == ["a"]
    assert names(target.parent) == ["x"]


@pytest.mark.parametrize("error", [UserError("no"), ValueError("bug"), KeyboardInterrupt(), SystemExit(1)])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "x") as partial:
            (partial / "a").write_text("1")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == []


def test_a_finished_folder_is_not_replaced_without_force(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with (
        pytest.raises(UserError, match=r"expert .*x exists already; use --force"),
        new_folder(tmp_path / "x", what="expert"),
    ):
        pytest.fail("must not come this far")
    refuse_existing(tmp_path / "x", force=True)
    refuse_existing(tmp_path / "y", force=False)


def test_force_replaces_a_folder_whole(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("1")
    with new_folder(tmp_path / "x", force=True) as partial:
        (partial / "new").write_text("2")
        assert names(tmp_path / "x") == ["old"]
    assert names(tmp_path / "x") == ["new"]
    assert names(tmp_path) == ["x"]


def test_force_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("1")
    with pytest.raises(UserError), new_folder(tmp_path / "x", force=True):
        raise UserError("no")
    assert names(tmp_path / "x") == ["old"]
    assert names(tmp_path) == ["x"]


def test_force_that_fails_at_the_last_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("1")
    rename = Path.rename

    def rename_but_not_the_new_one(path: Path, target: Path) -> Path:
        if files.PARTIAL_MARK in path.name:
            refusing(errno.EIO)()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_but_not_the_new_one)
    with pytest.raises(UserError, match="Input/output error"), new_folder(tmp_path / "x", force=True):
        pass
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["old"]


def test_a_full_disk_in_a_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no space left"), new_folder(tmp_path / "x"):
        refusing(errno.ENOSPC)()
    assert names(tmp_path) == []


def test_leftovers_of_dead_processes_are_cleared_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for number in (gone.pid, os.getpid()):
        (tmp_path / f".x.partial-{number}").mkdir()
    (tmp_path / ".y.partial-nonsense").mkdir()
    (tmp_path / "z").mkdir()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [f".x.partial-{os.getpid()}", "z"]


def test_removing_a_link_keeps_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "not there")
    assert names(tmp_path) == ["real"]


# --- links ---


def test_files_are_linked_and_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    link_or_copy(tmp_path / "link", tmp_path / "b")
    assert (tmp_path / "b").stat().st_ino == (tmp_path / "a").stat().st_ino
    assert not (tmp_path / "b").is_symlink()


def test_where_hard_links_do_not_work_a_symbolic_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("1")
    monkeypatch.setattr(os, "link", refusing(errno.EXDEV))
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").readlink() == (tmp_path / "a").resolve()
    with pytest.raises(UserError, match="File exists"):
        link_or_copy(tmp_path / "a", tmp_path / "b")


# --- locks ---

HOLDER = """
import sys, time
from pathlib import Path
from expertctl.core.artefacts.files import exclusive
with exclusive(Path(sys.argv[1]), "expert 'law'"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "locks" / "x.lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lock_keeps_another_process_out_until_it_dies_by_whatever_means(tmp_path: Path, holder: Any) -> None:
    lock = tmp_path / "locks" / "x.lock"
    begun = time.monotonic()
    with (
        pytest.raises(UserError, match="another process is working on expert 'law'; wait for it, or stop it"),
        exclusive(lock, "expert 'law'", patience_s=0.2),
    ):
        pytest.fail("the lock is held")
    assert time.monotonic() - begun < 5
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with exclusive(lock, "expert 'law'", patience_s=1):
        pass


def test_a_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bug"), exclusive(tmp_path / "x.lock", "it"):
        raise ValueError("bug")
    with exclusive(tmp_path / "x.lock", "it", patience_s=0):
        pass


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    old = tmp_path / f".model{DISCARDED_MARK}-999999999"
    old.mkdir()
    (old / "weights").write_text("old")
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert not old.exists()


@pytest.mark.parametrize("below", [False, True])
def test_leftovers_are_cleared_below_where_asked_to(tmp_path: Path, below: bool) -> None:
    deep = tmp_path / "training"
    deep.mkdir()
    gone, alive = f".x.safetensors.partial-{2**30}", f".x.safetensors.partial-{os.getpid()}"
    for place in (tmp_path, deep):
        for name in (gone, alive):
            (place / name).write_text("half")
    clear_leftovers(tmp_path, below=below)
    assert not (tmp_path / gone).exists()
    assert (deep / gone).exists() is not below
    assert (tmp_path / alive).exists() is not below  # the number may be another's by now
    assert (deep / alive).exists() is not below


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_neither_a_thread_nor_a_process_that_ended_unnoticed_is_alive() -> None:
    assert is_alive(str(os.getpid()))
    assert is_alive("1")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    os.kill(ended.pid, 0)  # it is there still
    assert not is_alive(str(ended.pid))
    ended.wait()
    alive: list[bool] = []
    thread = threading.Thread(target=lambda: alive.append(is_alive(str(threading.get_native_id()))))
    thread.start()
    thread.join()
    assert alive == [False]


def test_a_resumed_folder_does_not_publish_half_written_files_of_a_killed_process(tmp_path: Path) -> None:
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, signal, sys; from pathlib import Path; from expertctl.core.artefacts import files\n"
            "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
            "with files.resumable_folder(Path(sys.argv[1])) as folder:\n"
            "    (folder / 'weights').write_text('kept')\n"
            "    files.write_text(folder / 'manifest.json', '{}')",
            str(tmp_path / "out"),
        ]
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(names(files.unfinished_sibling(tmp_path / "out"))) == 2
    with resumable_folder(tmp_path / "out", resume=True) as folder:
        assert names(folder) == ["weights"]
        write_text(folder / "manifest.json", "{}")
    assert names(tmp_path / "out") == ["manifest.json", "weights"]
