"""What an owner's policy refuses, before a request is stored and while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from federation_members import BTM, FLEXOLMO, Clock, trained
from federation_messages import ROUND

from expertctl import UserError
from expertctl.core.artefacts.files import write_json
from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.owner import work as work_module
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.owner.policy import POLICY_FILE, read_policy, write_policy_template
from expertctl.experts.federation.protocol.requests import ExpertRequest

NewOwner = Callable[[str], Owner]


def ask(coordinator: Coordinator, clock: Clock, recipe: Any = BTM) -> ExpertRequest:
    (request,) = coordinator.ask(["site-a"], recipe, clock() + timedelta(hours=48))
    return request


def test_the_template_sets_no_limit_and_every_line_of_it_is_valid(tmp_path: Path) -> None:
    write_policy_template(tmp_path)
    assert read_policy(tmp_path) == read_policy(tmp_path / "nowhere")
    _, *limits = (tmp_path / POLICY_FILE).read_text().splitlines()
    (tmp_path / POLICY_FILE).write_text("\n".join(limit.removeprefix("# ") for limit in limits))
    policy = read_policy(tmp_path)
    assert (policy.recipes, policy.rounds, policy.max_hours, policy.delta) == (("flexolmo",), False, 48, 1e-6)
    write_policy_template(tmp_path)  # what the owner wrote stays
    assert read_policy(tmp_path) == policy


@pytest.mark.parametrize(
    ("policy", "change", "said"),
    [
        ("recipes: [flexolmo]", {}, "your policy allows flexolmo, and the request asks for 'all'"),
        ("max_tokens: 100", {}, "trains on 320 tokens; your policy allows 100"),
        (
            "max_tokens: 1000",
            {"training": {"tokens": 320, "batch_size": 8, "accumulation": 10**6}},
            "your policy allows 1,000",
        ),
        ("max_seed_gb: 0.000001", {}, "your policy allows 1e-06"),
        ("epsilon: 8", {}, "the request has no differential privacy; your policy demands epsilon of at most 8"),
        ("epsilon: 8", {"privacy": {"epsilon": 9.0, "delta": 1e-6}}, "the request has epsilon 9"),
        ("delta: 1.0e-7", {"privacy": {"epsilon": 1.0, "delta": 1e-6}}, "the request has delta 1e-06"),
        ("rounds: false", {"round": ROUND}, "your policy excludes rounds"),
        ("max_tokns: 100", {}, "did you mean 'max_tokens'"),
        ("[1]", {}, "has to hold names and values"),
    ],
)
def test_a_request_beyond_the_policy_is_not_stored(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock, policy: str, change: dict[str, Any], said: str
) -> None:
    owner = new_owner("site-a")
    request = ask(coordinator, clock)
    request = replace(request, recipe=replace(request.recipe, **change))
    (owner.state / POLICY_FILE).write_text(policy)
    with pytest.raises(UserError, match=said):
        owner.take(request)
    assert owner.requests() == []
    (owner.state / POLICY_FILE).unlink()
    owner.take(request)
    assert owner.requests() == [request]


def test_training_ends_after_the_hours_of_the_policy(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner = new_owner("site-a")
    request = ask(coordinator, clock)
    (owner.state / POLICY_FILE).write_text("max_hours: 1")
    owner.run_folder(request).mkdir(parents=True)
    write_json(owner.run_folder(request) / "spent.json", {"seconds": 3599.99})
    with pytest.raises(UserError, match="has taken the 1 hours that your policy allows; it is stopped"):
        trained(coordinator, owner, request)
    progress = owner.progress(request)
    assert (progress.state, progress.code) == ("failed", "POLICY")
    assert progress.step < progress.steps
    assert "your policy allows 1" in str(owner.objection(request))
    (owner.state / POLICY_FILE).write_text("max_hours: 2")
    assert owner.objection(request) is None
    assert (trained(coordinator, owner, request) / "expert.json").is_file()


def test_memory_beyond_the_limit_is_a_code(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = new_owner("site-a")
    request = ask(coordinator, clock)

    def fail(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes")

    monkeypatch.setattr(work_module, "_train", fail)
    with pytest.raises(RuntimeError):
        trained(coordinator, owner, request)
    assert owner.progress(request).code == "MEMORY"


def test_a_request_says_what_it_asks_for(coordinator: Coordinator, new_owner: NewOwner, clock: Clock) -> None:
    owner = new_owner("site-a")
    private = replace(FLEXOLMO, privacy={"epsilon": 8.0, "delta": 1e-5})
    said = owner.describe(ask(coordinator, clock, private))
    assert said.startswith("flexolmo, 10 steps of 32 tokens, epsilon 8, delta 1e-05, a seed of ")
    assert said.endswith(" bytes, until 2030-01-03 00:00 UTC")


def test_a_deadline_in_the_past_is_refused_on_both_sides(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner = new_owner("site-a")
    request = ask(coordinator, clock)
    with pytest.raises(UserError, match="the deadline of the request has passed"):
        owner.take(replace(request, deadline=datetime.now(UTC) - timedelta(minutes=1)))
    with pytest.raises(UserError, match="has passed; choose a later one"):
        coordinator.ask(["site-a"], BTM, clock() - timedelta(seconds=1))
