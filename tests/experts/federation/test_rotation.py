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
