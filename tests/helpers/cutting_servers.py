"""HTTP servers on real sockets that count the bytes they send and receive, and cut connections."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

PIECE = 1 << 16


class Traffic:
    """Counts bytes of bodies; connections are cut when the total passes the next of `cuts`."""

    def __init__(self, cuts: Sequence[int] = (), hold_after: int | None = None) -> None:
        self.cuts = list(cuts)
        self.hold_after = hold_after
        """Bytes after which the server sends nothing more, until `hold_after` is None."""
        self.total = 0
        self.by_path: Counter[str] = Counter()
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.held = threading.Event()
        self.released = threading.Event()

    def count(self, path: str, num_bytes: int) -> bool:
        """Count bytes and return whether the connection goes on."""
        if self.hold_after is not None and self.total >= self.hold_after:
            self.held.set()
            self.released.wait(60)
        with self.lock:
            self.total += num_bytes
            self.by_path[path] += num_bytes
            if self.cuts and self.total >= self.cuts[0]:
                self.cuts.pop(0)
                return False
            return True


class CuttingHandler(BaseHTTPRequestHandler):
    """A handler that sends and receives bodies in pieces, under the eyes of the server's traffic."""

    protocol_version = "HTTP/1.1"
    traffic: Traffic

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep standard error quiet."""

    def parse_request(self) -> bool:
        """Note every request."""
        is_valid = super().parse_request()
        if is_valid:
            with self.traffic.lock:
                self.traffic.requests.append(f"{self.command} {self.path}")
        return is_valid

    def send_content(self, content: bytes, headers: dict[str, str] | None = None, *, ranges: bool = True) -> None:
        """Answer with bytes, or the range of them that was asked for; only headers for HEAD."""
        begin, end, status = 0, len(content), 200
        if ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            begin, end, status = int(match[1]), min(int(match[2] or len(content)) + 1, len(content)), 206
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        for at in range(begin, end, PIECE):
            piece = content[at : min(at + PIECE, end)]
            if not self.traffic.count(urlsplit(self.path).path, len(piece)):
                self.close_connection = True
                return
            self.wfile.write(piece)

    def read_content(self) -> bytes | None:
        """Return the body of the request; None if the connection was cut on the way."""
        left, content = int(self.headers.get("Content-Length") or 0), b""
        while left:
            piece = self.rfile.read(min(left, PIECE))
            if not piece or not self.traffic.count(urlsplit(self.path).path, len(piece)):
                self.close_connection = True
                return None
            content, left = content + piece, left - len(piece)
        return content


@contextmanager
def serving(handler: type[CuttingHandler], traffic: Traffic, **attributes: object) -> Iterator[str]:
    """Serve on a free port of loopback and yield the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"traffic": traffic, **attributes}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        traffic.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class FileHandler(CuttingHandler):
    """Serves the files of a folder, with ranges unless `ranges` is False."""

    root: Path
    ranges = True

    def do_GET(self) -> None:  # named by the standard library
        """Send a file, or 404."""
        path = self.root / unquote(urlsplit(self.path).path).lstrip("/")
        if path.is_file():
            status = path.stat()
            self.send_content(path.read_bytes(), {"ETag": f'"{status.st_mtime_ns}"'}, ranges=self.ranges)
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815
