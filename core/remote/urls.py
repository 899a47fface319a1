"""Remote folders and files by URL: opening their fsspec file system, and errors that say what to do, without secrets."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from ..errors import UserError, first_line
from .hub_access import hub_allowed
from .retries import is_refusal, persistently, status_of

HUB = "hub:"
"""Prefix of repositories on the Hugging Face hub: `hub:owner/name` or `hub:owner/name@revision`."""
TIMEOUT_S = 120
"""Longest wait for the answer to one request, besides the time for its bytes."""
MIN_BYTES_PER_S = 32_768
"""Slowest transfer that is waited for; below, a request counts as a dropped connection."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://", re.ASCII)
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_SECRETS = (
    (re.compile(r"(?<=://)[^/@\s]+@"), ""),  # user and password
    (re.compile(r"\?[^\s'\")]+"), "?..."),  # signatures and tokens in a query
    (re.compile(r"\bhf_[A-Za-z0-9_]{6,}"), "hf_..."),
    (re.compile(r"(?i)\bbearer\s+[^\s'\"]+"), "Bearer ..."),
)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
LOG_IN = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
    "gcs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "run `hf auth login`, or set HF_TOKEN",
}
"""What to do without access, by storage."""
_WITH_FOLDERS = ("file", "local", "sftp", "ssh", "smb", "hdfs", "arrow_hdfs", "webhdfs", "ftp")
"""Protocols that need a folder before a file in it; to make one in an object store could make a bucket."""


def is_url(text: object) -> bool:
    """Return whether a text names a remote: `PROTOCOL://...`, or `hub:owner/name`."""
    return isinstance(text, str) and (text.startswith(HUB) or _URL.match(text) is not None)


def without_secrets(text: str) -> str:
    """Return a URL or a message without passwords, query strings and tokens."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


@dataclass(frozen=True)
class Remote:
    """A folder or file of an fsspec file system; every request is repeated if the connection drops."""

    fs: Any
    root: str
    """Path within the file system."""
    url: str
    """URL for messages, without secrets."""
    scheme: str
    stop: Event = field(default_factory=Event)
    """Set when a transfer has failed or was interrupted: requests of other threads are not repeated then."""

    def path(self, name: str) -> str:
        """Return the path of a file below the folder, itself for an empty name."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def call(self, method: str, *arguments: Any, what: str = "", num_bytes: int = 0, **options: Any) -> Any:
        """Call a method of the file system; raises `UserError` that names `what`, a file below the folder.

        `num_bytes` is what the call transfers: it may take `TIMEOUT_S`, and longer for many bytes. File systems that
        fsspec does not run asynchronously have timeouts of their own.
        """
        if self.fs.async_impl:
            options["timeout"] = TIMEOUT_S + num_bytes / MIN_BYTES_PER_S

        def request() -> Any:
            try:
                return getattr(self.fs, method)(*arguments, **options)
            except FileNotFoundError as error:
                raise _connection_error(error, self.scheme) or error from None

        try:
            return persistently(request, stop=self.stop)
        except UserError:
            raise
        except Exception as error:  # fsspec passes on whatever the transport raises
            raise self.error(error, what) from ConnectionError(without_secrets(first_line(error)))

    def info(self, name: str = "") -> dict[str, Any] | None:
        """Return what the file system knows about a file, None if it does not exist."""
        try:
            info = self.call("info", self.path(name), what=name)
        except MissingFile:
            return None
        return dict(info) if info.get("type") != "directory" else None

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return the bytes [begin, end) of a file, fewer if it is shorter; raises `MissingFile` if it does not exist."""
        # files of synchronous file systems would read ahead by more than a part
        options = {} if self.fs.async_impl else {"cache_type": "none"}
        content: bytes = self.call(
            "cat_file", self.path(name), start=begin, end=end, what=name, num_bytes=end - begin, **options
        )
        return content

    def read_whole(self, name: str, max_bytes: int) -> bytes:
        """Return a small file; raises `MissingFile` if it does not exist, and `UserError` if it has more bytes."""
        info = self.info(name)
        if info is None:
            raise MissingFile(f"{self.url}/{name} does not exist; check the URL")
        size = info.get("size")
        if not isinstance(size, int) or size > max_bytes:
            raise UserError(f"{self.url}/{name} is refused: it has {size} bytes, and {max_bytes:,} are allowed")
        return self.read(name, 0, size) if size else b""

    def make_parent(self, name: str) -> None:
        """Create the folder of a file where the protocol has folders."""
        if self.scheme in _WITH_FOLDERS:
            self.call("makedirs", self.path(name).rpartition("/")[0], exist_ok=True, what=name)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        if self.info(name) is not None:
            self.call("rm_file", self.path(name), what=name)

    def error(self, error: Exception, name: str = "") -> UserError:
        """Return the error of a failed request as one line without secrets."""
        place = f"{self.url}/{name}" if name else self.url
        reason = without_secrets(f"{type(error).__name__}: {first_line(error)}")[:200]
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            return MissingFile(f"{place} does not exist; check the URL")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(
                f"{place} was not stored ({reason}); free some space there, then run the same command again"
            )
        if is_refusal(error):
            log_in = LOG_IN.get(_EXTRAS.get(self.scheme, self.scheme), "check the credentials for this protocol")
            return UserError(f"{place}: access is denied ({reason}); {log_in}, or ask for the permission")
        return UserError(
            f"{place} cannot be reached ({reason}); check the connection and the URL, then run the same command again"
        )


def _connection_error(error: FileNotFoundError, scheme: str) -> Exception | None:
    """Return the dropped connection that fsspec's HTTP file system reports as a missing file, None if it is missing."""
    cause = error.__cause__
    if scheme not in ("http", "https") or not isinstance(cause, Exception) or isinstance(cause, FileNotFoundError):
        return None
    return None if status_of(cause) == 404 else cause


class MissingFile(UserError):
    """A remote file that does not exist."""


@contextmanager
def open_remote(url: str) -> Iterator[Remote]:
    """Yield the remote folder or file of a URL; raises `UserError` for an unknown protocol or a missing package."""
    import fsspec.core

    scheme = url.partition("://")[0].lower()
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme in ("http", "https"):
        options |= _bounded_responses()
    if not url.partition("://")[2].strip("/"):  # without its slashes, fsspec would read it as a local path
        raise UserError(f"{url} names no folder; write {scheme}://PLACE/FOLDER")
    if "::" in url:
        raise UserError(f"{without_secrets(url)} is a chain of URLs, which is not supported; give a single one")
    with hub_allowed() if scheme == "hf" else nullcontext():
        try:
            fs, root = fsspec.core.url_to_fs(url.rstrip("/"), **options)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            install = f'install it with: pip install "expertctl[{extra}]"' if extra else first_line(error)
            raise UserError(f"{scheme}:// URLs need another package; {install}") from error
        except ValueError:
            raise UserError(
                f"{without_secrets(url)}: unknown protocol '{scheme}'; known are s3, gs, hf, https, file and the others "
                "of fsspec"
            ) from None
        except Exception as error:  # of any file system, such as one that needs more than a URL
            reason = without_secrets(f"{type(error).__name__}: {first_line(error)}")[:200]
            raise UserError(f"{without_secrets(url)} cannot be opened ({reason}); choose another protocol") from error
        yield Remote(fs, str(root), without_secrets(url.rstrip("/")), scheme)


def _bounded_responses() -> dict[str, Any]:
    """Return options of fsspec's HTTP file system, with which no endless answer of a server fills the memory."""
    try:
        import aiohttp
    except ImportError:  # an extra; fsspec says so
        return {}

    class BoundedResponse(aiohttp.ClientResponse):
        """A response of which at most one byte more is read than was asked for, enough to notice that there are more."""

        async def read(self) -> bytes:
            asked = _RANGE.fullmatch(self.request_info.headers.get("Range", ""))
            if asked is None:
                return await super().read()
            limit = int(asked[2]) - int(asked[1]) + 2
            content = bytearray()
            while len(content) < limit and (piece := await self.content.read(limit - len(content))):
                content += piece
            return bytes(content)

    return {"client_kwargs": {"response_class": BoundedResponse}}
