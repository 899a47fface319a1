"""Writing so that nothing half-done can be mistaken for finished: temporary siblings, renames, locks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError

PARTIAL_MARK = ".partial"
DISCARDED_MARK = ".discarded"
UNFINISHED_MARK = ".unfinished"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, keys in the given order, one final newline."""
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file as everything here writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically: readers see the old content or the new, never a part."""
    partial = partial_sibling(path)
    try:
        with readable_os_errors(path):
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `UserError` for a file that is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number or nesting without end
        raise UserError(f"{path} is damaged ({error}); make the folder again or restore the file") from None
    except OSError as error:
        raise _user_error(path, error) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


@contextmanager
def new_folder(path: Path, *, force: bool = False, what: str = "folder") -> Iterator[Path]:
    """Give a temporary sibling to fill; it becomes `path` when the block ends, and is gone if it fails.

    Raises `UserError` when `path` exists already, unless `force`, which then replaces it whole.
    """
    _put_back(path)
    refuse_existing(path, force=force, what=what)
    partial = partial_sibling(path)
    with readable_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # What an earlier, killed process of the same number left; the caller's lock keeps living ones out.
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
def resumable_folder(
    path: Path, *, force: bool = False, resume: bool = False, what: str = "folder"
) -> Iterator[Path]:
    """Give a hidden sibling to fill that outlives a kill, an interruption and a full disk; see `unfinished_sibling`.

    With `resume` it comes as the last try left it, else empty. It becomes `path` when the block ends, and is gone
    if the block fails for any other reason. Raises `UserError` when `path` exists already, unless `force`. The
    caller holds a lock.
    """
    _put_back(path)
    refuse_existing(path, force=force, what=what)
    partial = unfinished_sibling(path)
    with readable_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            remove_tree(partial)
        partial.mkdir(exist_ok=True)
        # what a try left that was killed while it wrote a file would be published
        clear_leftovers(partial, below=True)
        try:
            yield partial
            _put_in_place(partial, path)
        except Exception as error:
            if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
                remove_tree(partial)
            raise


def unfinished_sibling(path: Path) -> Path:
    """Return where the content of `path` is gathered by a job that can be resumed."""
    return path.with_name(f".{path.name}{UNFINISHED_MARK}")


def is_unfinished(path: Path) -> bool:
    """Tell whether a folder is the content of a job that can be resumed, by its name."""
    return path.name.startswith(".") and path.name.endswith(UNFINISHED_MARK)


def unfinished_names(parent: Path) -> list[str]:
    """Return the names of the folders in `parent` whose making was stopped and can be resumed, sorted."""
    found = parent.glob(f".*{UNFINISHED_MARK}")
    return sorted(path.name[1 : -len(UNFINISHED_MARK)] for path in found if path.is_dir())


def _put_in_place(partial: Path, path: Path) -> None:
    """Make a complete folder appear under its name, in place of what was there; a kill at any point loses neither."""
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
    """Undo a replacement that was killed between its two renames, or finish one that was killed after them."""
    for discarded in path.parent.glob(f".{path.name}{DISCARDED_MARK}-*"):
        if is_alive(discarded.name.rpartition("-")[2]):
            continue
        if path.exists():
            remove_tree(discarded)
        else:
            discarded.rename(path)


def refuse_existing(path: Path, *, force: bool, what: str = "folder") -> None:
    """Raise `UserError` when finished work stands in the way."""
    if path.exists() and not force:
        raise UserError(f"{what} {path} exists already; use --force to replace it, or another name")


def sync_tree(folder: Path) -> None:
    """Make sure that every regular file below has reached the disk before its folder is renamed."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def clear_leftovers(parent: Path, *, below: bool = False) -> None:
    """Remove what killed processes left under way in `parent`; call only while holding its lock.

    `below`: in all that is below it too, by whomever. That is for folders in which the lock's holder alone writes, and does not
    ask whether a number belongs to a process by now that has nothing to do with it.
    """
    pattern = f".*{PARTIAL_MARK}-*"
    for path in list(parent.rglob(pattern) if below else parent.glob(pattern)):
        if below or not is_alive(path.name.rpartition("-")[2]):
            remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def partial_sibling(path: Path) -> Path:
    """Return the temporary name under which `path` is written."""
    return path.with_name(f".{path.name}{PARTIAL_MARK}-{os.getpid()}")


def link_or_copy(source: Path, target: Path) -> None:
    """Give `target` the content of `source` without copying it where the file system allows.

    A hard link when both are on one file system, else a symbolic link. Finished files are never written in
    place here, so sharing them is safe, and `verify` notices if somebody else does.
    """
    source = source.resolve()
    with readable_os_errors(target):
        try:
            os.link(source, target)
        except OSError:
            # another file system, or one without hard links
            target.symlink_to(source)


@contextmanager
def readable_os_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses (full disk, no permission) into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise _user_error(path, error) from error


@contextmanager
def exclusive(path: Path, what: str, *, patience_s: float = 5.0) -> Iterator[None]:
    """Hold the lock file `path` for the block; the operating system drops it if the process dies.

    Raises `UserError` when another process still holds it after `patience_s` seconds (long enough for the
    workers of a killed command to notice and end).
    """
    from filelock import FileLock, Timeout

    with readable_os_errors(path):
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


def _user_error(path: Path, error: OSError) -> UserError:
    return mendable(error, path) or UserError(f"{error.filename or path}: {error.strerror or error}")


def mendable(error: OSError, path: Path | None = None) -> UserError | None:
    """Return what a user can do about a full disk or a missing permission; None for any other trouble."""
    where = error.filename or path or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"no space left while writing {where} ({error.strerror}); free some, then run the same command again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{where} may not be written or read ({error.strerror}); check who owns the folder")
    return None


def is_alive(pid: str) -> bool:
    """Tell whether a process of that number is running: no thread of another, and none that ended and waits to be noticed."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    try:
        lines = Path(f"/proc/{int(pid)}/status").read_text(errors="replace").splitlines()
    except OSError:  # no such folder on this system
        return True
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return status.get("Tgid", pid) == str(int(pid)) and not status.get("State", "").startswith(("Z", "X"))
