"""Certificates: an authority that stays, a server's for every name, keys for nobody else, and what openssl says of them."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from expertctl import UserError
from expertctl.plugins.flower.protocol.certificates import certificates_for, fingerprint_of, reachable_names


def test_the_server_is_known_under_every_name_and_by_this_authority_only(tmp_path: Path) -> None:
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


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    certificates_for(tmp_path / "tls", [])
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "tls").glob("*.key")} == {
        "ca.key": "0o600",
        "server.key": "0o600",
    }
    assert (tmp_path / "tls").stat().st_mode & 0o077 == 0


def test_the_authority_stays_and_the_server_s_is_made_again_for_another_name(tmp_path: Path) -> None:
    first = certificates_for(tmp_path / "tls", ["a.example.org"])
    content = first.certificate.read_bytes()
    assert certificates_for(tmp_path / "tls", ["a.example.org"]).certificate.read_bytes() == content
    second = certificates_for(tmp_path / "tls", ["b.example.org"])
    assert second.fingerprint == first.fingerprint == fingerprint_of(first.authority)
    assert second.certificate.read_bytes() != content
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(second.certificate, second.key)


def test_what_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("hello")
    with pytest.raises(UserError, match=r"ca\.crt is no certificate"):
        fingerprint_of(tmp_path / "ca.crt")
    with pytest.raises(UserError, match="the coordinator hands out"):
        fingerprint_of(tmp_path / "other.crt")


def test_a_server_for_every_address_is_called_by_this_machine_s_names() -> None:
    assert reachable_names("hub.example.org") == ["hub.example.org"]
    assert len(reachable_names("0.0.0.0")) >= 2
