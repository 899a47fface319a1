"""Owners' keys: elliptic curve P-384 in OpenSSH's format, which is what Flower's nodes are known by as well."""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ....core.artefacts.files import readable_os_errors
from ....core.errors import UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

KEY_FILE = "owner.key"
PUBLIC_FILE = "owner.pub"
KIND = "ecdsa-sha2-nistp384"
EXTRA = 'federations need the packages of an extra: pip install "expertctl[federation]"'


@dataclass(frozen=True)
class PublicKey:
    """What an owner is known by."""

    line: str
    """As in a `.pub` file, without its comment."""

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read the text of a `.pub` file; raises `UserError` for anything but one P-384 key."""
        words = text.split()
        if len(words) < 2 or words[0] != KIND:
            kind = words[0][:40] if words else "nothing"
            raise UserError(
                f"that is no public key of a data owner but {kind}; `expertctl federate keys` makes one ({KIND})"
            )
        key = cls(f"{words[0]} {words[1]}")
        key._loaded()
        return key

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """Read a `.pub` file."""
        with readable_os_errors(path):
            if path.stat().st_size > 10_000:
                raise UserError(f"{path} is too large for a public key")
            return cls.parse(path.read_text(encoding="utf-8", errors="replace"))

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it: `SHA256:...`."""
        blob = base64.b64decode(self.line.split()[1])
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")

    def verify(self, data: bytes, signature: str) -> bool:
        """Tell whether the owner's private key signed these bytes."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            self._loaded().verify(base64.b64decode(signature, validate=True), data, ec.ECDSA(hashes.SHA384()))
        except (InvalidSignature, ValueError):
            return False
        return True

    def _loaded(self) -> EllipticCurvePublicKey:
        require_cryptography()
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key

        try:
            key = load_ssh_public_key(self.line.encode())
        except Exception as error:  # the library raises several kinds of its own
            raise UserError(
                f"the public key is damaged ({type(error).__name__}); ask its owner for it again"
            ) from None
        assert isinstance(key, ec.EllipticCurvePublicKey)  # since the line says so, and was parsed
        return key


@dataclass(frozen=True)
class OwnerKey:
    """An owner's pair of keys."""

    path: Path
    """Of the private part."""
    public: PublicKey

    def sign(self, data: bytes) -> str:
        """Return a signature of these bytes (ECDSA with SHA-384, base64)."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return base64.b64encode(_private(self.path).sign(data, ec.ECDSA(hashes.SHA384()))).decode()


def make_key(folder: Path) -> OwnerKey:
    """Make a pair of keys in a folder, readable by its owner alone; raises `UserError` where there is one already."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    path = folder / KEY_FILE
    if path.exists():
        raise UserError(
            f"{path} exists already; it is what the coordinator knows you by, so it is not replaced"
        )
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    with readable_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
        (folder / PUBLIC_FILE).write_text(f"{line}\n", encoding="utf-8")
    return OwnerKey(path, PublicKey.parse(line))


def read_key(folder: Path) -> OwnerKey:
    """Read the keys of a folder; raises `UserError` for none, and for a private part that others can read."""
    require_cryptography()
    path = folder / KEY_FILE
    if not path.is_file():
        raise UserError(f"there is no key in {folder}; make one with `expertctl federate keys`")
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by others; make it yours alone: chmod 600 {path}")
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = _private(path).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return OwnerKey(path, PublicKey.parse(public))


def require_cryptography() -> None:
    """Raise `UserError` where the library that signs is not installed."""
    from importlib.util import find_spec

    if find_spec("cryptography") is None:
        raise UserError(EXTRA)


def _private(path: Path) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except Exception as error:  # the library raises several kinds of its own
        raise UserError(
            f"{path} is damaged or locked ({type(error).__name__}); make a new key and hand it in"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise UserError(f"{path} is no key of curve P-384; make one with `expertctl federate keys`")
    return key
