"""Atomic file and folder writes (temporary sibling, then rename), lock files, and paths that come from outside."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

PARTIAL_MARK = ".partial"
DISCARDED_MARK = ".discarded"
UNFINISHED_MARK = ".unfinished"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, keys in the given order, one final newline."""
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file in the project's format: two spaces of indent, one final newline."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically: readers see either the old content or the new content."""
    with replacement_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def replacement_file(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` on success and is deleted on failure; `mode`: permissions, less the umask."""
    partial = partial_sibling(path)
    try:
        with os_errors_as_user_errors(path):
            with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `UserError` if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # also: an oversized number, unbounded nesting
        raise UserError(f"{path} is damaged ({error}); make the folder again or restore the file") from None
    except OSError as error:
        raise _user_error(path, error) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def inside(root: Path, *names: str) -> Path:
    """Return `root / names[0] / ...`; raises `UserError` unless every name is that of a single file or folder.

    For names that come from outside, so that the path cannot leave `root`.
    """
    for name in names:
        is_plain = name not in ("", ".", "..") and not set(name) & {"/", "\\"} and not _has_control_characters(name)
        if not is_plain or len(name.encode()) > 255:
            raise UserError(f"{name!a:.80} is not the name of a file or folder; it is refused")
    return root.joinpath(*names)


def _has_control_characters(name: str) -> bool:
    """Return whether a name has some, such as line feeds, or halves of surrogate pairs, which cannot be encoded."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in name)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise `UserError` if the file system of a folder has less space than is to be written."""
    with os_errors_as_user_errors(folder):
        free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(f"{num_bytes:,} bytes are to be written to {folder}, and {free:,} are free; free some space")


def require_regular(path: Path) -> Path:
    """Return a path from outside; raises `UserError` for a link, pipe, device or folder, which could read or wait elsewhere."""
    with os_errors_as_user_errors(path):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path} is not a regular file; it is refused")
    return path


@contextmanager
def new_folder(path: Path, *, force: bool = False, what: str = "folder") -> Iterator[Path]:
    """Yield a folder that becomes `path` on success and is deleted on failure; an existing `path` needs `force`."""
    _put_back(path)
    refuse_existing(path, force=force, what=what)
    partial = partial_sibling(path)
    with os_errors_as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # left by a killed process with the same pid; the caller's lock excludes live processes
        remove_tree(partial)
        clear_leftovers(path.parent)
        partial.mkdir()
        try:
            yield partial
            _put_in_place(partial, path)
        except BaseException:
            remove_tree(partial)
            raise


@contextmanager
def resumable_folder(path: Path, *, force: bool = False, resume: bool = False, what: str = "folder") -> Iterator[Path]:
    """Yield a hidden sibling folder (`unfinished_sibling`) that survives a kill, an interruption or a full disk.

    With `resume` it holds what the last attempt left, otherwise it is empty. It is renamed to `path` on success
    and deleted if the block fails for any other reason. Raises `UserError` if `path` exists already, unless
    `force`. The caller must hold a lock.
    """
    _put_back(path)
    refuse_existing(path, force=force, what=what)
    partial = unfinished_sibling(path)
    with os_errors_as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            remove_tree(partial)
        partial.mkdir(exist_ok=True)
        # partial files of a killed attempt would be published otherwise
        clear_leftovers(partial, below=True)
        try:
            yield partial
            _put_in_place(partial, path)
        except Exception as error:
            if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
                remove_tree(partial)
            raise


def unfinished_sibling(path: Path) -> Path:
    """Return the hidden folder in which a resumable job collects the content of `path`."""
    return path.with_name(f".{path.name}{UNFINISHED_MARK}")


def is_unfinished(path: Path) -> bool:
    """Return whether a folder's name marks it as the unfinished output of a resumable job."""
    return path.name.startswith(".") and path.name.endswith(UNFINISHED_MARK)


def unfinished_names(parent: Path) -> list[str]:
    """Return the names of the folders in `parent` with an unfinished, resumable job, sorted."""
    paths = parent.glob(f".*{UNFINISHED_MARK}")
    return sorted(path.name[1 : -len(UNFINISHED_MARK)] for path in paths if path.is_dir())


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename a complete folder to `path`, replacing an existing one; a kill at any point loses neither."""
    sync_tree(partial)
    if not path.exists():
        partial.rename(path)
        return
    discarded = path.with_name(f".{path.name}{DISCARDED_MARK}-{os.getpid()}")
    path.rename(discarded)
    try:
        partial.rename(path)
    except BaseException:
        discarded.rename(path)
        raise
    remove_tree(discarded)


def _put_back(path: Path) -> None:
    """Undo a replacement killed between its two renames, or finish one killed after them."""
    for discarded in path.parent.glob(f".{path.name}{DISCARDED_MARK}-*"):
        if is_alive(discarded.name.rpartition("-")[2]):
            continue
        if path.exists():
            remove_tree(discarded)
        else:
            discarded.rename(path)


def refuse_existing(path: Path, *, force: bool, what: str = "folder") -> None:
    """Raise `UserError` if `path` exists already, unless `force`."""
    if path.exists() and not force:
        raise UserError(f"{what} {path} exists already; use --force to replace it, or choose another name")


def sync_tree(folder: Path) -> None:
    """Flush every regular file below `folder` to disk (fsync)."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def clear_leftovers(parent: Path, *, below: bool = False) -> None:
    """Remove partial files that killed processes left in `parent`; the caller must hold its lock.

    `below` also removes them from all subfolders without checking whether their pid is alive, since the pid may
    have been reused. Use it only for folders that nobody but the lock holder writes to.
    """
    pattern = f".*{PARTIAL_MARK}-*"
    for path in list(parent.rglob(pattern) if below else parent.glob(pattern)):
        if below or not is_alive(path.name.rpartition("-")[2]):
            remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove a file or a folder with its content; does nothing if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def partial_sibling(path: Path, pid: int | None = None) -> Path:
    """Return the temporary path of this process, or of another one, for writing `path`."""
    return path.with_name(f".{path.name}{PARTIAL_MARK}-{os.getpid() if pid is None else pid}")


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy small files from folder to folder, as far as they exist."""
    for name in names:
        if (source / name).is_file():
            with os_errors_as_user_errors(target / name):
                (target / name).write_bytes((source / name).read_bytes())


def link_or_copy(source: Path, target: Path) -> None:
    """Link `target` to `source`: a hard link if both are on one file system, otherwise a symbolic link.

    Sharing is safe because finished files are never modified in place; `verify` detects changes by others.
    """
    source = source.resolve()
    with os_errors_as_user_errors(target):
        try:
            os.link(source, target)
        except OSError:
            # different file systems, or no support for hard links
            target.symlink_to(source)


@contextmanager
def os_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Raise a `UserError` in place of an `OSError` such as a full disk or a missing permission."""
    try:
        yield
    except OSError as error:
        raise _user_error(path, error) from error


@contextmanager
def exclusive(path: Path, what: str, *, patience_s: float = 5.0) -> Iterator[None]:
    """Hold the lock file `path` for the block; the operating system releases it if the process dies.

    Raises `UserError` if another process still holds it after `patience_s` seconds (long enough for the workers
    of a killed command to exit).
    """
    from filelock import FileLock, Timeout

    with os_errors_as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=patience_s)
        except Timeout:
            raise UserError(f"another process is working on {what}; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def exclusive_output(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of an output folder outside of any workspace; see `exclusive`.

    The lock file lies in the user's cache and stays there: deleting one that another process is about to lock would
    let both in.
    """
    with exclusive(cache_file(folder, "locks", ".lock"), what):
        yield


def cache_file(path: Path, kind: str, suffix: str) -> Path:
    """Return the file about `path` in a subfolder of the user's cache, `$XDG_CACHE_HOME/expertctl`."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    return cache_folder(kind) / f"{name}{suffix}"


def cache_folder(kind: str) -> Path:
    """Return a subfolder of the user's cache, `$XDG_CACHE_HOME/expertctl`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "expertctl" / kind


def _user_error(path: Path, error: OSError) -> UserError:
    return user_fixable_error(error, path) or UserError(f"{error.filename or path}: {error.strerror or error}")


def user_fixable_error(error: OSError, path: Path | None = None) -> UserError | None:
    """Return a `UserError` for a full disk, a missing permission or too long a name, None for any other error."""
    where = error.filename or path or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"no space left while writing {where} ({error.strerror}); free some space and rerun the command"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission to access {where} ({error.strerror}); check the folder's owner and mode")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"the name {str(where)[:40]}... is longer than the file system allows; choose a shorter one")
    return None


def is_alive(pid: str) -> bool:
    """Return whether `pid` is a running process, as opposed to a thread of another process or a zombie."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    try:
        lines = Path(f"/proc/{int(pid)}/status").read_text(errors="replace").splitlines()
    except OSError:  # no procfs on this system
        return True
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return status.get("Tgid", pid) == str(int(pid)) and not status.get("State", "").startswith(("Z", "X"))
