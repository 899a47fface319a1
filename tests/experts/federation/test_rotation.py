"""Replacing an owner's key: both keys sign, requests follow, and deliveries are signed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from federation_members import BTM, Clock, hand_in, trained

from expertctl import UserError
from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.judging.refusal import RefusalCode
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.protocol.keys import make_key, read_key
from expertctl.experts.federation.protocol.rotation import KeyRotation

NewOwner = Callable[[str], Owner]


def test_a_trained_expert_is_delivered_with_the_new_key(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner = new_owner("site-a")
    (request,) = coordinator.ask(["site-a"], BTM, clock() + timedelta(hours=48))
    trained(coordinator, owner, request)
    by_old_key = owner.delivery(request)
    old = owner.key().public
    new = owner.rotate_key(lambda rotation, _: coordinator.rotate_key(rotation)).public
    assert new == owner.key().public != old
    assert (owner.state / "owner.key.old").stat().st_mode & 0o077 == 0
    (moved,) = coordinator.open_requests("site-a")
    assert moved == replace(request, key=new.fingerprint)
    owner.take(moved)
    refusal = coordinator.begin(moved, by_old_key)
    assert not isinstance(refusal, dict)
    assert refusal.code is RefusalCode.SIGNATURE
    signed = owner.delivery(moved)
    assert hand_in(coordinator, owner.delivery_folder(moved), moved, signed) is None
    last = [entry for entry in coordinator.files.ledger.entries() if entry.state == "rotated"]
    assert [(entry.owner, entry.detail) for entry in last] == [("site-a", new.fingerprint)]


def test_nobody_rotates_a_key_without_having_both(
    coordinator: Coordinator, new_owner: NewOwner, tmp_path: Path
) -> None:
    owner, other = new_owner("site-a"), new_owner("site-b")
    stranger = make_key(tmp_path / "stranger")
    good = KeyRotation.of(owner.key(), stranger)
    for bad in (
        replace(good, old_signature=good.new_signature),
        replace(good, new_signature=good.old_signature),
        replace(good, new=other.key().public.line),
        KeyRotation.of(stranger, owner.key()),
        KeyRotation.of(owner.key(), owner.key()),
        KeyRotation.of(owner.key(), other.key()),
    ):
        with pytest.raises(UserError):
            coordinator.rotate_key(bad)
    assert coordinator.files.members.get("site-a").key == owner.key().public
    assert KeyRotation.of_json(good.as_json()) == good
    coordinator.rotate_key(good)
    with pytest.raises(UserError, match="may have been rotated already"):
        coordinator.rotate_key(good)


def test_a_rotation_that_cannot_be_sent_changes_nothing_and_is_sent_again(
    coordinator: Coordinator, new_owner: NewOwner
) -> None:
    owner = new_owner("site-a")
    old = owner.key().public
    tried = []

    def fail(rotation: KeyRotation, _: object) -> None:
        tried.append(rotation.new)
        raise UserError("no connection")

    with pytest.raises(UserError, match="no connection"):
        owner.rotate_key(fail)
    assert owner.key().public == old
    new = owner.rotate_key(lambda rotation, _: coordinator.rotate_key(rotation))
    assert tried == [new.public.line]  # the same pair, since the first try may have arrived
    assert read_key(owner.state).public == new.public
    assert not (owner.state / "next-key").exists()


def test_keys_can_be_rotated_again_and_a_kill_in_between_is_made_up_for(
    coordinator: Coordinator, new_owner: NewOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = new_owner("site-a")
    seen = {owner.key().public.line}
    for _ in range(3):
        seen.add(owner.rotate_key(lambda rotation, _: coordinator.rotate_key(rotation)).public.line)
        assert coordinator.files.members.get("site-a").key == owner.key().public
    assert len(seen) == 4
    replaced = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if self.name == "owner.key":
            raise KeyboardInterrupt
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        owner.rotate_key(lambda rotation, _: coordinator.rotate_key(rotation))
    monkeypatch.undo()
    owner.rotate_key(lambda rotation, new: None)  # the coordinator has it already, as `rotate-key` finds out
    assert coordinator.files.members.get("site-a").key == owner.key().public


def test_a_key_that_was_in_use_before_does_not_come_back(coordinator: Coordinator, new_owner: NewOwner) -> None:
    owner = new_owner("site-a")
    coordinator.remove("site-a")
    first = owner.key()
    coordinator.invite("site-a", first.public)
    owner.rotate_key(lambda rotation, _: coordinator.rotate_key(rotation))
    with pytest.raises(UserError, match="was in use before"):
        coordinator.rotate_key(KeyRotation.of(owner.key(), replace(first, path=owner.state / "owner.key.old")))
    member = coordinator.files.members.get("site-a")
    coordinator.remove("site-a")
    with pytest.raises(UserError, match="was removed or has another key by now"):
        coordinator.files.members.replace_key(member, first.public)
