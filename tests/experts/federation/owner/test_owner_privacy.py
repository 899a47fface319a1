"""Differential privacy that an owner demands, whatever the request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from federation_members import BTM, TRAINING, Clock, hand_in, trained

from expertctl import UserError
from expertctl.core.manifests.manifest import read_manifest
from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.owner.recipes import recipe_of
from expertctl.experts.federation.owner.work import work
from expertctl.experts.federation.protocol.requests import ExpertRequest, Recipe, RoundOf

OWN = {"epsilon": 8.0, "delta": 1e-3}
NewOwner = Callable[[str], Owner]


def insist(owner: Owner, **privacy: float) -> None:
    owner.configure(replace(owner.settings(), privacy={**OWN, **privacy}))


def ask(coordinator: Coordinator, clock: Clock, recipe: Recipe = BTM) -> ExpertRequest:
    (request,) = coordinator.ask(["site-a"], recipe, clock() + timedelta(hours=48))
    return request


def test_an_owner_can_demand_privacy_that_the_request_does_not(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    pytest.importorskip("opacus")
    owner = new_owner("site-a")
    insist(owner)
    request = ask(coordinator, clock)
    spent = read_manifest(trained(coordinator, owner, request)).data.privacy
    assert 0 < spent.epsilon <= 8.0
    review = owner.review(request)
    assert review.privacy == spent
    signed = owner.delivery(request)
    assert hand_in(coordinator, owner.delivery_folder(request), request, signed) is None
    kept = read_manifest(coordinator.layout.experts / "site-a")
    assert (kept.data.privacy, kept.metrics) == (spent, {})


def test_an_expert_without_noise_is_not_delivered_after_the_owner_demands_privacy(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    pytest.importorskip("opacus")
    owner = new_owner("site-a")
    request = ask(coordinator, clock)
    expert = trained(coordinator, owner, request)
    before = owner.delivery(request).statement.expert
    insist(owner)
    assert not owner.is_trained(request)
    with pytest.raises(UserError, match="or your settings demand"):
        owner.review(request)
    work(owner, request)
    assert read_manifest(expert).data.privacy.epsilon <= 8.0
    assert owner.delivery(request).statement.expert != before
    insist(owner, epsilon=9.0)  # what is there spends less than that
    assert owner.is_trained(request)
    insist(owner, epsilon=1.0)
    assert not owner.is_trained(request)


@pytest.mark.parametrize(
    ("asked", "own", "expected"),
    [
        (None, None, None),
        ({"epsilon": 3.0, "delta": 1e-5}, None, {"epsilon": 3.0, "delta": 1e-5}),
        (None, {"epsilon": 3.0, "delta": 1e-5}, {"epsilon": 3.0, "delta": 1e-5}),
        ({"epsilon": 3.0, "delta": 1e-4}, {"epsilon": 8.0, "delta": 1e-5}, {"epsilon": 3.0, "delta": 1e-5}),
        (
            {"epsilon": 3.0, "delta": 1e-4, "clip": 2.0},
            {"epsilon": 1.0, "delta": 1e-3, "accountant": "prv"},
            {"epsilon": 1.0, "delta": 1e-4, "clip": 2.0, "accountant": "prv"},
        ),
    ],
)
def test_the_stricter_privacy_budget_applies(
    coordinator: Coordinator,
    new_owner: NewOwner,
    clock: Clock,
    asked: dict[str, float] | None,
    own: dict[str, float] | None,
    expected: dict[str, float] | None,
) -> None:
    owner = new_owner("site-a")
    owner.configure(replace(owner.settings(), privacy=own))
    assert owner.privacy(ask(coordinator, clock, replace(BTM, privacy=asked))) == expected


def test_an_owner_who_demands_privacy_refuses_rounds(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner = new_owner("site-a")
    shared = Recipe("all", {}, TRAINING, round=RoundOf("campus", "0" * 16, 0, 2, 5))
    request = ask(coordinator, clock, shared)
    insist(owner)
    with pytest.raises(UserError, match="round 1 of 2 of 'campus' is trained without"):
        owner.take(request)
    assert owner.requests() == []
    owner.configure(replace(owner.settings(), privacy=None))
    owner.take(request)
    assert owner.objection(request) is None
    insist(owner)
    assert "round 1 of 2 of 'campus' is trained without" in str(owner.objection(request))


@pytest.mark.parametrize("wrong", [{"epsilon": 0, "delta": 1e-6}, {"epsilon": 8}, {"epsilon": 8, "detla": 1e-6}])
def test_invalid_privacy_settings_are_refused_when_requested(new_owner: NewOwner, wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="differential privacy"):
        recipe_of("btm", privacy=wrong)
    owner = new_owner("site-a")
    with pytest.raises(UserError, match="differential privacy"):
        owner.configure(replace(owner.settings(), privacy=wrong))
    assert owner.settings().privacy is None
