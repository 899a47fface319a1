"""The owner's end of the coordinator's endpoints: signed requests over TLS, answers as codes, nothing larger than a part in memory."""

from __future__ import annotations

import hashlib
import json
import secrets
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ....core.errors import UserError
from ....experts.federation.protocol.delivery import Signed
from ....experts.federation.protocol.keys import OwnerKey
from ....experts.federation.protocol.parts import FileParts
from ....experts.federation.protocol.progress import Progress
from ..protocol.certificates import fingerprint_of
from ..protocol.endpoints import PATH, STATUS
from ..protocol.signing import EMPTY, signed_headers

PIECE = 1 << 18
TIMEOUT_S = 90.0
"""Of silence, not of a whole transfer: a slow link is no error."""
MAX_JSON = 1 << 20
SENTENCES = {
    "UNKNOWN_KEY": "the coordinator does not know this key; give it {public} and ask to be invited",
    "BAD_SIGNATURE": "the coordinator does not accept this key's signature; --ca has to be the file of this very coordinator",
    "CLOCK": "this machine's clock differs from the coordinator's by more than five minutes; set it",
    "DUPLICATE": "another process with this key is joined already; run `join` in one place only",
    "DISK": "the coordinator's disk is full; what has arrived is kept",
    "TOO_LARGE": "the coordinator takes no parts of that size; let both use the same version",
    "WRONG_BYTES": "what arrived is not what was sent; it is sent again",
}


class Unreachable(Exception):
    """The connection failed or was cut; the same again, later, is right."""


class Declined(Exception):
    """The coordinator answered with a code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code

    def sentence(self, public: Path) -> str:
        """Return what that means for the owner."""
        return SENTENCES.get(self.code, f"the coordinator declined ({self.code})").format(public=public)


@dataclass(frozen=True)
class Hello:
    """What a coordinator says to an owner who shows up."""

    name: str
    """What it calls the owner."""
    open: tuple[str, ...] = ()
    """Requests that are open."""
    more: bool = False
    """Whether others will follow by themselves: later rounds of a shared model."""


class CoordinatorClient:
    """Speaks to one coordinator as one owner."""

    def __init__(self, server: str, authority: Path, key: OwnerKey) -> None:
        import httpx

        self._key, self._audience = key, fingerprint_of(authority)
        self.session = secrets.token_hex(8)
        context = ssl.create_default_context(cafile=str(authority))
        self._client = httpx.Client(
            base_url=f"https://{server}",
            verify=context,
            timeout=TIMEOUT_S,
            trust_env=False,
            follow_redirects=False,
        )

    def close(self) -> None:
        self._client.close()

    def hello(self) -> Hello:
        """Show up, and return what the coordinator says."""
        found = self._ask("GET", "requests")
        return Hello(str(found["name"]), tuple(str(one) for one in found["open"]), bool(found["more"]))

    def seed_part(self, request: str, file: FileParts, index: int) -> bytes:
        """Fetch one part of the seed; its digest is checked by who puts it in its place."""
        begin, end = file.span(index)
        target = f"{PATH}seed/{request}/{quote(file.name, safe='')}/{index}"
        data = self._send("GET", target, EMPTY, None, end - begin)
        if len(data) != end - begin:
            raise Unreachable("the part was cut short")
        return data

    def progress(self, request: str, progress: Progress) -> None:
        """Tell how far a training is."""
        self._ask("POST", f"progress/{request}", progress.as_json())

    def begin(self, request: str, signed: Signed) -> Mapping[str, Any]:
        """Announce a delivery: `{"missing": {FILE: [PART...]}}`, or `{"refusal": CODE}`."""
        return self._ask("POST", f"begin/{request}", signed.as_json())

    def put(self, request: str, file: FileParts, index: int, data: bytes) -> None:
        """Send one part of a file."""
        target = f"{PATH}part/{request}/{quote(file.name, safe='')}/{index}"
        self._send("PUT", target, file.parts[index], data, MAX_JSON)

    def finish(self, request: str) -> Mapping[str, Any]:
        """Ask for the verdict: `{"state": "accepted" | "judging"}`, or `{"refusal": CODE}`."""
        return self._ask("POST", f"finish/{request}")

    def _ask(self, method: str, what: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = json.dumps(content).encode() if content is not None else b""
        return _object(self._send(method, PATH + what, hashlib.sha256(body).hexdigest(), body, MAX_JSON))

    def _send(self, method: str, target: str, digest: str, body: bytes | None, most: int) -> bytes:
        import httpx

        headers = signed_headers(self._key, method, target, digest, self.session, self._audience)
        if body is not None:
            headers["content-length"] = str(len(body))
        try:
            with self._client.stream(
                method, target, headers=headers, content=_pieces(body) if body else None
            ) as reply:
                data = bytearray()
                for piece in reply.iter_raw():
                    data += piece
                    if len(data) > most:
                        raise UserError(
                            "the coordinator answers with more than was asked for; that is not its server"
                        )
        except httpx.TransportError as error:
            raise Unreachable(type(error).__name__) from None
        if reply.status_code == 200:
            return bytes(data)
        if reply.status_code >= 500 and reply.status_code != STATUS["DISK"]:
            raise Unreachable(f"status {reply.status_code}")
        try:
            raise Declined(str(_object(bytes(data))["code"])[:40])
        except KeyError:
            raise UserError(
                f"{self._client.base_url.host} answers with status {reply.status_code}, as no coordinator does"
            ) from None


def _pieces(body: bytes) -> Iterator[bytes]:
    view = memoryview(body)
    for begin in range(0, len(view), PIECE):
        yield bytes(view[begin : begin + PIECE])


def _object(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError("the server answers with something else than a coordinator does; check --server")
    return content
