"""The coordinator's TLS certificates: its own certificate authority, and a server certificate for its host names."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from ....core.artefacts.files import os_errors_as_user_errors, replacement_file
from ....core.errors import UserError

LIFETIME = timedelta(days=3650)
"""Default validity of new certificates."""
RENEW_BEFORE = timedelta(days=30)
"""Time before its expiry at which the server's certificate is renewed, at most a third of its validity."""
LOCAL_NAMES = ("127.0.0.1", "localhost")
ALL_INTERFACES = {"0.0.0.0", "::", ""}


@dataclass(frozen=True)
class Certificates:
    """Paths of the certificates."""

    authority: Path
    """Certificate of the authority, `ca.crt`, which owners need."""
    certificate: Path
    key: Path

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the authority's certificate."""
        return fingerprint_of(self.authority)

    def valid_until(self) -> tuple[datetime, datetime]:
        """Return when the certificates of authority and server expire, in UTC."""
        return _read(self.authority).not_valid_after_utc, _read(self.certificate).not_valid_after_utc


def certificates_for(folder: Path, names: Sequence[str], lifetime: timedelta = LIFETIME) -> Certificates:
    """Return a coordinator's certificates for these host names and addresses, creating missing ones valid for `lifetime`.

    The authority is created once, since owners have a copy. The server's certificate is renewed for a new name and before it
    expires. Raises `UserError` for unreadable files, and for an authority that has expired.
    """
    all_names = tuple(dict.fromkeys([*LOCAL_NAMES, *names]))
    certificates = Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    with os_errors_as_user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        if not (certificates.authority.is_file() and (folder / "ca.key").is_file()):
            _make_authority(folder, lifetime)
        expiry = _read(certificates.authority).not_valid_after_utc
        if expiry <= datetime.now(UTC):
            raise UserError(
                f"the certificate authority expired on {expiry:%Y-%m-%d}; move {folder} away, and send the new ca.crt to all owners"
            )
        if not _is_valid_for(certificates, all_names, min(RENEW_BEFORE, lifetime / 3)):
            _make_server(folder, certificates, all_names, lifetime)
    return certificates


def reachable_names(host: str) -> list[str]:
    """Return the names and addresses of a server that listens on `host`; for all interfaces, those of this machine."""
    if host not in ALL_INTERFACES:
        return [host]
    names = [socket.gethostname(), socket.getfqdn()]
    with contextlib.suppress(OSError):  # a machine that cannot resolve its own name needs --name
        names += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)]
    return [name.partition("%")[0] for name in names if name]


def fingerprint_of(path: Path) -> str:
    """Return a certificate's sha256 in the form of browsers and `openssl x509 -fingerprint`."""
    return _read(path).fingerprint(hashes.SHA256()).hex(":").upper()


def _read(path: Path) -> x509.Certificate:
    if not path.is_file():
        raise UserError(f"{path} does not exist; ask the coordinator for its ca.crt")
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is not a certificate; fetch the coordinator's ca.crt again") from None


def _is_valid_for(certificates: Certificates, names: Sequence[str], renew_before: timedelta) -> bool:
    """Return whether the server's certificate exists, is signed by the authority, covers the names and is not about to expire."""
    if not (certificates.certificate.is_file() and certificates.key.is_file()):
        return False
    authority = _read(certificates.authority)
    try:
        certificate = x509.load_pem_x509_certificate(certificates.certificate.read_bytes())
        certificate.verify_directly_issued_by(authority)
        key = load_pem_private_key(certificates.key.read_bytes(), password=None)
        if key.public_key() != certificate.public_key():  # a kill came between the two files
            return False
    except (ValueError, TypeError, InvalidSignature):
        return False
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    covered = {str(name.value) for name in alternative}
    return set(names) <= covered and certificate.not_valid_after_utc > datetime.now(UTC) + renew_before


def _make_authority(folder: Path, lifetime: timedelta) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"expertctl federation {os.urandom(4).hex()}")])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key, lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_key(folder / "ca.key", key)
    (folder / "ca.crt").write_bytes(certificate.public_bytes(Encoding.PEM))


def _make_server(folder: Path, certificates: Certificates, names: Sequence[str], lifetime: timedelta) -> None:
    authority = _read(certificates.authority)
    signer = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)  # `_make_authority` writes this type
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[-1][:64])])
    alternative = x509.SubjectAlternativeName([_general_name(name) for name in names])
    certificate = (
        _builder(subject, authority.subject, key, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(alternative, critical=False)
        .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write_key(certificates.key, key)
    certificates.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # tolerates clocks that differ
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with replacement_file(path, mode=0o600) as file:
        file.write(content)
