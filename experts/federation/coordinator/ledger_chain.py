"""Signatures of the ledger's lines, each of which names the digest of the line before: a change anywhere is found."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....core.artefacts.files import os_errors_as_user_errors, replacement_file
from ....core.errors import UserError
from ..protocol.requests import canonical_json

PREVIOUS, SIGNATURE = "previous", "signature"
"""Fields of a line beside those of its entry."""
KEY_FILE = "ledger.key"
TAIL = 1 << 16
"""Bytes at the end of a ledger in which its last line is looked for; lines are a few hundred bytes long."""


@dataclass(frozen=True)
class LedgerAudit:
    """Result of checking a ledger."""

    lines: int
    digest: str
    """Digest of the last line; a copy that is kept elsewhere shows later whether lines were removed from the end."""
    problems: tuple[str, ...]
    """What does not match, by line; empty for an intact ledger."""


class LedgerChain:
    """Signs new lines of a ledger with a key beside it, which is made with the first line."""

    def __init__(self, ledger: Path) -> None:
        self._ledger, self._key_file = ledger, ledger.with_name(KEY_FILE)
        self._key: Any = None

    def signed(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a line with the digest of the last one and a signature; the caller holds the ledger's lock."""
        line = {**content, PREVIOUS: self._last_digest()}
        signature = self._signing_key().sign(canonical_json(line))
        return {**line, SIGNATURE: base64.b64encode(signature).decode()}

    def audit(self, known: str | None = None) -> LedgerAudit:
        """Check every line; `known` is the digest of a line that has to be there.

        Raises `UserError` if there is no ledger or no key.
        """
        from cryptography.exceptions import InvalidSignature

        if not self._ledger.is_file() or not self._key_file.is_file():
            raise UserError(
                f"there is no signed ledger in {self._ledger.parent}; it begins with the first invitation or request"
            )
        public = self._signing_key().public_key()
        previous, problems, digests = "", [], set()
        for number, line in _lines(self._ledger.read_bytes()):
            signature = line.pop(SIGNATURE, "")
            if line.get(PREVIOUS) != previous:
                problems.append(f"line {number} does not follow the line before it")
            try:
                public.verify(base64.b64decode(str(signature), validate=True), canonical_json(line))
            except (InvalidSignature, ValueError):
                problems.append(f"line {number} is not signed by this coordinator, or was changed")
            previous = _digest({**line, SIGNATURE: signature})
            digests.add(previous)
        if known is not None and known not in digests:
            problems.append(f"no line has the digest {known:.64}: lines were removed")
        return LedgerAudit(len(digests), previous, tuple(problems))

    def _last_digest(self) -> str:
        if not self._ledger.is_file():
            return ""
        with self._ledger.open("rb") as file:
            size = tail = file.seek(0, os.SEEK_END)
            for tail in (TAIL, size):  # all of it only if the last line is longer
                file.seek(max(size - tail, 0))
                lines = [line for _, line in _lines(file.read())]
                if lines:
                    return _digest(lines[-1])
        return ""

    def _signing_key(self) -> Any:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            NoEncryption,
            PrivateFormat,
            load_pem_private_key,
        )

        if self._key is not None:
            return self._key
        with os_errors_as_user_errors(self._key_file):
            if not self._key_file.is_file():
                key = Ed25519PrivateKey.generate()
                with replacement_file(self._key_file, mode=0o600) as file:
                    file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            self._key = load_pem_private_key(self._key_file.read_bytes(), password=None)
        return self._key


def _lines(content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and content of every complete line; one that a kill cut short is left out."""
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict):
            yield number, parsed


def _digest(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(line)).hexdigest()
