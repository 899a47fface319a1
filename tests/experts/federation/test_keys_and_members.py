"""Owner keys and the member list: signatures, file permissions and uniqueness."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from expertctl import UserError
from expertctl.experts.federation.coordinator.members import Members
from expertctl.experts.federation.protocol.keys import PublicKey, make_key, read_key


def test_the_public_key_verifies_signatures_of_the_private_key(tmp_path: Path) -> None:
    key, other = make_key(tmp_path / "a"), make_key(tmp_path / "b")
    signature = key.sign(b"an expert")
    public = PublicKey.read(tmp_path / "a" / "owner.pub")
    assert public == key.public == read_key(tmp_path / "a").public
    assert public.verify(b"an expert", signature)
    assert not public.verify(b"another", signature)
    assert not other.public.verify(b"an expert", signature)
    assert not public.verify(b"an expert", "no signature at all")
    assert not public.verify(b"an expert", "")


def test_the_private_key_is_readable_by_its_owner_only_and_not_replaced(tmp_path: Path) -> None:
    make_key(tmp_path / "state")
    path = tmp_path / "state" / "owner.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        make_key(tmp_path / "state")
    assert path.read_bytes() == before
    path.chmod(0o644)
    with pytest.raises(UserError, match="can be read by other users; restrict it: chmod 600"):
        read_key(tmp_path / "state")


def test_other_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no key in"):
        read_key(tmp_path)
    for line in ("", "ssh-ed25519 AAAA", "not a key", "ecdsa-sha2-nistp384 notbase64!"):
        with pytest.raises(UserError, match=r"not an owner's public key|is damaged"):
            PublicKey.parse(line)
    make_key(tmp_path / "a")
    (tmp_path / "a" / "owner.key").write_text("garbage")
    with pytest.raises(UserError, match="is damaged or has a passphrase"):
        read_key(tmp_path / "a")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_ssh_keygen_shows_the_same_fingerprint_and_its_keys_work(tmp_path: Path) -> None:
    key = make_key(tmp_path / "a")
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", tmp_path / "a" / "owner.pub"], capture_output=True, text=True, check=True
    ).stdout
    assert key.public.fingerprint in shown


def test_other_spellings_of_a_key_are_the_same_key(tmp_path: Path) -> None:
    key = make_key(tmp_path / "a").public
    kind, encoded = key.line.split()
    assert PublicKey.parse(f"{kind} {encoded}= comment") == key
    members = Members(tmp_path / "members.json")
    members.add("clinic", key)
    with pytest.raises(UserError, match="clinic"):
        members.add("court", PublicKey.parse(f"{kind} {encoded}="))


def test_names_and_keys_of_members_are_unique(tmp_path: Path) -> None:
    members = Members(tmp_path / "federation" / "members.json")
    first, second = make_key(tmp_path / "a").public, make_key(tmp_path / "b").public
    assert members.all() == []
    assert members.add("site-b", first).name == "site-b"
    assert members.add("site-b", first).key == first  # again: nothing changes
    with pytest.raises(UserError, match="'site-b' was invited with another key"):
        members.add("site-b", second)
    with pytest.raises(UserError, match="'site-b' has that key"):
        members.add("site-c", first)
    with pytest.raises(UserError, match=r"cannot be called '\.\./x'"):
        members.add("../x", second)
    members.add("site-a", second)
    assert [member.name for member in Members(members.path).all()] == ["site-a", "site-b"]
    assert members.find_by_key(second.fingerprint) == members.get("site-a")
    members.remove("site-a")
    assert members.find_by_key(second.fingerprint) is None
    with pytest.raises(UserError, match="no member 'site-a'"):
        members.get("site-a")


def test_several_owners_are_invited_all_or_none(tmp_path: Path) -> None:
    members, others = Members(tmp_path / "members.json"), Members(tmp_path / "members.json")
    first, second = make_key(tmp_path / "a").public, make_key(tmp_path / "b").public
    with pytest.raises(UserError, match="'site-a' has that key"):
        members.add_all({"site-a": first, "site-b": first})
    assert members.all() == []
    assert [member.name for member in members.add_all({"site-b": first, "site-a": second})] == [
        "site-b",
        "site-a",
    ]
    assert others.get("site-b").key == first
    members.remove("site-b")
    assert [member.name for member in others.all()] == ["site-a"]
