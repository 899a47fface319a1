"""TLS certificates: a stable authority, server certificates for every name, private key files, verification by openssl."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from expertctl import UserError
from expertctl.plugins.flower.protocol import certificates
from expertctl.plugins.flower.protocol.certificates import certificates_for, fingerprint_of, reachable_names


def test_the_server_certificate_covers_every_name_and_only_this_authority_signs_it(tmp_path: Path) -> None:
    from cryptography import x509

    made = certificates_for(tmp_path / "tls", ["hub.example.org", "192.0.2.7", "2001:db8::1"])
    authority = x509.load_pem_x509_certificate(made.authority.read_bytes())
    server = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(name.value) for name in names} == {
        *("127.0.0.1", "localhost", "hub.example.org", "192.0.2.7", "2001:db8::1")
    }
    if shutil.which("openssl"):  # another implementation's opinion
        command = [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            "sslserver",
            "-CAfile",
            str(made.authority),
        ]
        said = subprocess.run([*command, str(made.certificate)], capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr


def test_private_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    certificates_for(tmp_path / "tls", [])
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "tls").glob("*.key")} == {
        "ca.key": "0o600",
        "server.key": "0o600",
    }
    assert (tmp_path / "tls").stat().st_mode & 0o077 == 0


def test_a_new_name_renews_the_server_certificate_but_not_the_authority(tmp_path: Path) -> None:
    first = certificates_for(tmp_path / "tls", ["a.example.org"])
    content = first.certificate.read_bytes()
    assert certificates_for(tmp_path / "tls", ["a.example.org"]).certificate.read_bytes() == content
    second = certificates_for(tmp_path / "tls", ["b.example.org"])
    assert second.fingerprint == first.fingerprint == fingerprint_of(first.authority)
    assert second.certificate.read_bytes() != content
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(second.certificate, second.key)


def test_files_that_are_not_certificates_are_named(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("hello")
    with pytest.raises(UserError, match=r"ca\.crt is not a certificate"):
        fingerprint_of(tmp_path / "ca.crt")
    with pytest.raises(UserError, match="ask the coordinator for its"):
        fingerprint_of(tmp_path / "other.crt")


def test_a_server_on_all_interfaces_has_the_names_of_this_machine() -> None:
    assert reachable_names("hub.example.org") == ["hub.example.org"]
    assert len(reachable_names("0.0.0.0")) >= 2


def test_a_certificate_is_renewed_before_it_expires_and_an_expired_authority_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime):
        ahead = timedelta()

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + cls.ahead

    monkeypatch.setattr(certificates, "datetime", Later)
    lifetime = timedelta(days=30)
    first = certificates_for(tmp_path, [], lifetime)
    expiry = first.valid_until()
    assert all(timedelta(days=29) < until - datetime.now(UTC) < timedelta(days=31) for until in expiry)
    Later.ahead = timedelta(days=19)
    assert certificates_for(tmp_path, [], lifetime).valid_until() == expiry
    Later.ahead = timedelta(days=21)  # a third of its time is left
    renewed = certificates_for(tmp_path, [], lifetime).valid_until()
    assert renewed[0] == expiry[0]
    assert renewed[1] > expiry[1]
    Later.ahead = timedelta(days=31)
    with pytest.raises(UserError, match="the certificate authority expired on"):
        certificates_for(tmp_path, [], lifetime)
