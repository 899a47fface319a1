"""Owners' key pairs: ECDSA on the curve P-384 in OpenSSH format, the kind that also authenticates Flower nodes."""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ....core.artefacts.files import os_errors_as_user_errors
from ....core.errors import UserError

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
except ImportError:
    raise UserError('the federation extra is not installed: pip install "expertctl[federation]"') from None

KEY_FILE = "owner.key"
PUBLIC_FILE = "owner.pub"
KIND = "ecdsa-sha2-nistp384"


@dataclass(frozen=True)
class PublicKey:
    """The public key that identifies an owner."""

    line: str
    """Key type and base64 key as in a `.pub` file, without the comment."""

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Parse the text of a `.pub` file; raises `UserError` for anything but a P-384 key."""
        words = text.split()
        if len(words) < 2 or words[0] != KIND:
            kind = words[0][:40] if words else "an empty file"
            raise UserError(f"not an owner's public key ({kind}); `expertctl federate keys` makes one of type {KIND}")
        loaded = cls(f"{words[0]} {words[1]}")._load()  # written anew: base64 has several spellings of the same bytes
        return cls(loaded.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """Read a `.pub` file."""
        with os_errors_as_user_errors(path):
            if path.stat().st_size > 10_000:
                raise UserError(f"{path} is too large for a public key")
            return cls.parse(path.read_text(encoding="utf-8", errors="replace"))

    @property
    def fingerprint(self) -> str:
        """Fingerprint in the form of `ssh-keygen -l`: `SHA256:...`."""
        blob = base64.b64decode(self.line.split()[1])
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")

    def verify(self, data: bytes, signature: str) -> bool:
        """Return whether the owner's private key signed these bytes."""
        try:
            self._load().verify(base64.b64decode(signature, validate=True), data, ec.ECDSA(hashes.SHA384()))
        except (InvalidSignature, ValueError):
            return False
        return True

    def _load(self) -> ec.EllipticCurvePublicKey:
        try:
            key = serialization.load_ssh_public_key(self.line.encode())
        except Exception as error:  # the library raises several types
            raise UserError(
                f"the public key is damaged ({type(error).__name__}); ask the owner to send it again"
            ) from None
        assert isinstance(key, ec.EllipticCurvePublicKey)  # `parse` checked the key type
        return key


@dataclass(frozen=True)
class OwnerKey:
    """An owner's key pair."""

    path: Path
    """File of the private key."""
    public: PublicKey

    def sign(self, data: bytes) -> str:
        """Sign bytes with ECDSA and SHA-384; return the signature in base64."""
        return base64.b64encode(_read_private(self.path).sign(data, ec.ECDSA(hashes.SHA384()))).decode()


def make_key(folder: Path) -> OwnerKey:
    """Make a key pair in a folder, with a private key only its owner can read; raises `UserError` if one exists."""
    path = folder / KEY_FILE
    if path.exists():
        raise UserError(f"{path} exists already and identifies you to the coordinator; it is not replaced")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    with os_errors_as_user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
        (folder / PUBLIC_FILE).write_text(f"{line}\n", encoding="utf-8")
    return OwnerKey(path, PublicKey.parse(line))


def read_key(folder: Path) -> OwnerKey:
    """Read the key pair in a folder; raises `UserError` if it is missing or others can read the private key."""
    path = folder / KEY_FILE
    if not path.is_file():
        raise UserError(f"there is no key in {folder}; make one with `expertctl federate keys`")
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by other users; restrict it: chmod 600 {path}")
    public = _read_private(path).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return OwnerKey(path, PublicKey.parse(public))


def _read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except Exception as error:  # the library raises several types
        raise UserError(
            f"{path} is damaged or has a passphrase ({type(error).__name__}); make a new key and send its public part to the coordinator"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise UserError(f"{path} is not a P-384 key; make one with `expertctl federate keys`")
    return key
