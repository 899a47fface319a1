"""Shared models: rounds through the same requests and deliveries as experts."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_members import MODULES, TRAINING, Clock, hand_in, private_text, trained
from reporters import Recorder
from safetensors.torch import load_file, save_file

from expertctl import UserError, Workspace, load_model, verify
from expertctl.core.artefacts.digests import digest_of_tensors, digests_of_folder
from expertctl.core.artefacts.layout import Layout
from expertctl.core.manifests.manifest import read_manifest
from expertctl.experts.federation.coordinator import round_keeper
from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.coordinator.owner_status import owner_statuses
from expertctl.experts.federation.coordinator.round_keeper import (
    advance,
    begin_rounds,
    keep_rounds,
    status_of,
)
from expertctl.experts.federation.judging.acceptance import HeldOut
from expertctl.experts.federation.judging.refusal import RefusalCode
from expertctl.experts.federation.judging.round_weights import AveragingRules
from expertctl.experts.federation.owner.owner import Owner, OwnerSettings
from expertctl.experts.federation.protocol.delivery import SignedStatement
from expertctl.experts.federation.protocol.keys import make_key
from expertctl.experts.federation.protocol.parts import parts_of
from expertctl.experts.federation.protocol.requests import ExpertRequest, Progress, Recipe, RoundOf
from expertctl.experts.federation.rounds.averaging import OuterRecipe, outer_step
from expertctl.experts.federation.rounds.rounds import RoundPlan
from expertctl.experts.federation.rounds.shared_model import SharedModel, SharedSettings
from expertctl.merge.generalists.card import model_card

NewOwner = Callable[[str], Owner]
ROUNDS = 2
SETTINGS = SharedSettings(ROUNDS, TRAINING)
HOUR = 3600.0


def plan(recipe: str = "fedavg", **settings: object) -> RoundPlan:
    return RoundPlan(tuple(MODULES), recipe, round_seconds=HOUR, **settings)  # type: ignore[arg-type]


def open_request(coordinator: Coordinator, name: str) -> ExpertRequest:
    (request,) = coordinator.open_requests(name)
    return request


def play(coordinator: Coordinator, owners: dict[str, Owner], *names: str) -> None:
    """Train and deliver every owner's open request."""
    for name in names or owners:
        request = open_request(coordinator, name)
        trained(coordinator, owners[name], request)
        owners[name].drop_superseded()
        assert deliver(coordinator, owners[name], request) is None
        owners[name].note_outcome(request, None)


def deliver(coordinator: Coordinator, owner: Owner, request: ExpertRequest) -> object:
    signed = owner.delivery(request)
    return hand_in(coordinator, owner.delivery_folder(request), request, signed)


@pytest.fixture
def owners(new_owner: NewOwner) -> dict[str, Owner]:
    return {name: new_owner(name) for name in MODULES}


@pytest.mark.parametrize("recipe", ["fedavg", "diloco"])
def test_rounds_end_in_a_generalist_that_averages_the_owners(
    coordinator: Coordinator, owners: dict[str, Owner], recipe: str
) -> None:
    shared = begin_rounds(coordinator, "together", plan(recipe), SETTINGS)
    seed = load_file(coordinator.layout.seed / "model.safetensors")
    play(coordinator, owners)
    made = [load_file(owner.expert_folder(owner.requests()[0]) / "model.safetensors") for owner in owners.values()]
    (report,) = advance(coordinator, shared)[:1]
    assert report == "round 1 of 2 of 'together': site-a and site-b averaged"
    shares = shared.rounds.report(0).shares
    after = load_file(shared.rounds.open.shared)
    outer = shared.rounds.recipe
    for name, before in seed.items():
        mean = sum(share * model[name].double() for share, model in zip(shares.values(), made, strict=True))
        expected, _ = outer_step(before.double(), before.double() - mean, None, outer)
        assert torch.allclose(after[name].double(), expected, atol=1e-5), name
    assert isinstance(outer, OuterRecipe)
    play(coordinator, owners)
    assert advance(coordinator, shared)[-1] == "'together' is finished: generalists/together"
    workspace = Workspace(coordinator.layout.root)
    folder = workspace.generalists / "together"
    assert verify(folder) == []
    assert load_file(folder / "model.safetensors").keys() == seed.keys()
    model, _ = load_model(folder)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    manifest = read_manifest(folder)
    assert manifest.parents[0].digest == read_manifest(coordinator.layout.seed).digest
    assert [round_["number"] for round_ in manifest.merged.rounds] == [0, 1]
    assert sorted(manifest.expert_data) == sorted(MODULES)
    assert coordinator.layout.finished_experts() == []
    assert status_of(coordinator, shared).state == "finished"
    assert advance(coordinator, shared) == []
    assert [(status.state, status.detail) for status in owner_statuses(coordinator)] == [
        ("accepted", "round 2 of 2 of 'together'")
    ] * 2


def test_owners_delete_the_state_of_closed_rounds(coordinator: Coordinator, owners: dict[str, Owner]) -> None:
    shared = begin_rounds(coordinator, "together", plan(), SETTINGS)
    play(coordinator, owners)
    advance(coordinator, shared)
    first = owners["site-a"].requests()[0]
    kept = owners["site-a"].shared_folder(first) / "state"
    assert list(kept.glob("step-*"))
    play(coordinator, owners)
    owner = owners["site-a"]
    (second,) = owner.requests()
    assert (second.recipe.round, second.id != first.id) == (shared.recipe().round, True)
    for name, kinds in {"runs": 1, "deliveries": 1, "seeds": 1, "requests": 1, "outcomes": 1}.items():
        files = [path for path in (owner.state / name).iterdir() if not path.name.startswith(".")]
        assert len(files) == kinds, name
    assert not kept.exists()  # it was the last round
    assert sorted(path.name for path in (shared.root / "seeds").iterdir()) == ["00001"]


def test_the_optimiser_state_persists_between_rounds(coordinator: Coordinator, owners: dict[str, Owner]) -> None:
    begin_rounds(coordinator, "together", plan(), replace(SETTINGS, total=5))
    for number in range(2):
        play(coordinator, owners)
        advance(coordinator, coordinator.shared_models()["together"])
        request = owners["site-a"].requests()[0]
        steps = [path.name for path in (owners["site-a"].shared_folder(request) / "state").iterdir()]
        assert f"step-{2 * (number + 1):08d}" in steps


def test_a_quorum_suffices_after_the_deadline_and_missing_owners_return(
    coordinator: Coordinator, owners: dict[str, Owner], clock: Clock
) -> None:
    shared = begin_rounds(coordinator, "together", plan(quorum=0.5), SETTINGS)
    late = open_request(coordinator, "site-b")
    trained(coordinator, owners["site-b"], late)
    play(coordinator, owners, "site-a")
    assert advance(coordinator, shared) == []
    assert status_of(coordinator, shared).missing == ("site-b",)
    clock.pass_hours(1.5)
    said = advance(coordinator, shared)
    assert said[0] == "round 1 of 2 of 'together': site-a averaged, without site-b"
    refusal = deliver(coordinator, owners["site-b"], late)
    assert refusal is not None
    assert refusal.code is RefusalCode.LATE  # type: ignore[attr-defined]
    play(coordinator, owners)
    advance(coordinator, shared)
    assert sorted(shared.rounds.report(1).shares) == sorted(MODULES)


def test_a_round_below_the_quorum_waits_for_an_extension(
    coordinator: Coordinator, owners: dict[str, Owner], clock: Clock
) -> None:
    shared = begin_rounds(coordinator, "together", plan(), SETTINGS)
    play(coordinator, owners, "site-a")
    request = open_request(coordinator, "site-b")
    clock.pass_hours(2)
    (said,) = advance(coordinator, shared)
    assert said.startswith("round 1 of 2 of 'together' has 1 of 2 owners and needs 2; repeat the same")
    assert status_of(coordinator, shared).state == "short"
    begin_rounds(coordinator, "together", plan(), SETTINGS)
    again = open_request(coordinator, "site-b")
    assert (again.id, again.deadline > request.deadline) == (request.id, True)
    play(coordinator, owners, "site-b")
    assert advance(coordinator, shared)[0].endswith("site-a and site-b averaged")


def altered(owner: Owner, request: ExpertRequest, factor: float) -> None:
    """Deliver altered weights, with a consistent and signed statement."""
    folder = owner.delivery_folder(request)
    signed = owner.delivery(request)
    weights = {name: factor * tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")
    manifest = read_manifest(folder)
    (folder / "delivery.json").unlink()
    (folder / "expert.json").unlink()
    tensors, files = digests_of_folder(folder)
    changed = replace(manifest, tensors=tensors, files=files, digest=digest_of_tensors(tensors))
    changed.write(folder)
    statement = replace(
        signed.statement,
        expert=changed.digest,
        files=tuple(parts_of(folder / file.name) for file in signed.statement.files),
    )
    resigned = replace(signed, statement=statement, signature=owner.key().sign(statement.signed_bytes))
    (folder / "delivery.json").write_text(json.dumps(resigned.as_json()))


def test_two_models_share_a_first_round_and_closed_rounds_cannot_be_replayed(
    coordinator: Coordinator, owners: dict[str, Owner]
) -> None:
    first = begin_rounds(coordinator, "first", plan(), SETTINGS)
    old = open_request(coordinator, "site-a")
    play(coordinator, owners)
    kept = owners["site-a"].state / "kept"
    shutil.copytree(owners["site-a"].delivery_folder(old), kept)
    begin_rounds(coordinator, "second", plan("diloco"), SETTINGS)
    play(coordinator, owners)
    advance(coordinator, first)
    request = next(
        request for request in coordinator.open_requests("site-a") if str(request.recipe.round).endswith("of 'first'")
    )
    signed = SignedStatement.read(kept)
    statement = replace(signed.statement, request=request.id, seed=request.seed, recipe=request.recipe.digest)
    again = replace(signed, statement=statement, signature=owners["site-a"].key().sign(statement.signed_bytes))
    refusal = hand_in(coordinator, kept, request, again)
    assert refusal is not None
    assert refusal.code is RefusalCode.REPLAY


@pytest.mark.parametrize(
    ("factor", "code"),
    [(float("nan"), RefusalCode.NOT_FINITE), (2.5, RefusalCode.NORM), (9.0, RefusalCode.NORM)],
)
def test_invalid_weights_are_left_out_of_the_round(
    coordinator: Coordinator, owners: dict[str, Owner], factor: float, code: RefusalCode
) -> None:
    """Scale 2.5 keeps each tensor within the bound of an expert but exceeds the bound of a round."""
    shared = begin_rounds(coordinator, "together", plan(quorum=0.5), SETTINGS)
    play(coordinator, owners, "site-a")
    request = open_request(coordinator, "site-b")
    trained(coordinator, owners["site-b"], request)
    altered(owners["site-b"], request, factor)
    refusal = deliver(coordinator, owners["site-b"], request)
    assert refusal is not None
    assert refusal.code is code  # type: ignore[attr-defined]
    assert "site-b" in shared.rounds.open.refused()
    said = advance(coordinator, shared)  # nobody is waited for
    assert said[0] == "round 1 of 2 of 'together': site-a averaged, without site-b"
    assert list((coordinator.files.root / "quarantine").iterdir())
    assert len(coordinator.open_requests("site-b")) == 1  # that of the next round


def test_weights_with_a_high_loss_on_public_text_are_left_out(
    coordinator: Coordinator, owners: dict[str, Owner], clock: Clock
) -> None:
    seen: list[tuple[Path, Path]] = []

    def measure(seed: Path, folder: Path) -> HeldOut:
        seen.append((seed, folder))
        load_model(folder)
        return HeldOut(2.0, 4.1)

    strict = Coordinator(coordinator.layout, measure=measure, now=clock)
    shared = begin_rounds(strict, "together", plan(quorum=0.5), SETTINGS)
    request = open_request(strict, "site-a")
    trained(strict, owners["site-a"], request)
    refusal = deliver(strict, owners["site-a"], request)
    assert refusal is not None
    assert refusal.code is RefusalCode.HELD_OUT  # type: ignore[attr-defined]
    assert seen[0][0] == shared.seed_folder()


def test_the_losses_on_public_text_of_an_accepted_delivery_are_recorded(
    coordinator: Coordinator, owners: dict[str, Owner], clock: Clock
) -> None:
    scoring = Coordinator(coordinator.layout, measure=lambda *_: HeldOut(2.0, 1.9), now=clock)
    begin_rounds(scoring, "together", plan(quorum=0.5), SETTINGS)
    play(scoring, owners, "site-a")
    status = {status.owner: status.public_loss for status in owner_statuses(scoring)}
    assert status == {"site-a": {"seed": 2.0, "expert": 1.9}, "site-b": None}


def test_an_owner_slower_than_the_rounds_finishes_its_request_and_counts_late(
    coordinator: Coordinator, owners: dict[str, Owner], clock: Clock
) -> None:
    settings = SharedSettings(3, {**TRAINING, "tokens": TRAINING["tokens"] * 3})
    shared = begin_rounds(coordinator, "together", plan(quorum=0.5, late_rounds=1), settings)
    slow = open_request(coordinator, "site-b")
    assert slow.deadline - shared.rounds.open.deadline == timedelta(hours=1)
    coordinator.files.record_progress(slow.id, Progress("training", 1, 2), clock())
    play(coordinator, owners, "site-a")
    clock.pass_hours(1)
    said = advance(coordinator, shared)
    assert said[0] == "round 1 of 3 of 'together': site-a averaged, without site-b"
    assert coordinator.open_requests("site-b") == [slow]  # it is not asked for the next round
    trained(coordinator, owners["site-b"], slow)
    assert deliver(coordinator, owners["site-b"], slow) is None
    assert coordinator.finish(slow) is None  # the verdict may be asked for again
    play(coordinator, owners, "site-a")
    said = advance(coordinator, shared)
    assert said[0] == "round 2 of 3 of 'together': site-a and site-b (1 late) averaged"
    play(coordinator, owners)
    advance(coordinator, shared)
    folder = coordinator.layout.generalists / "together"
    assert [round_["late"] for round_ in read_manifest(folder).merged.rounds] == [{}, {"site-b": 1}, {}]
    card = model_card(read_manifest(folder))
    assert "| owner | counted | of these late | refused | not delivered | mean share |" in card
    assert "| site-a | 3 | 0 | 0 | 0 |" in card
    assert "| site-b | 2 | 1 | 0 | 1 |" in card


def test_an_owner_who_did_not_begin_is_asked_for_the_open_round(
    coordinator: Coordinator, owners: dict[str, Owner], clock: Clock
) -> None:
    settings = SharedSettings(3, {**TRAINING, "tokens": TRAINING["tokens"] * 3})
    shared = begin_rounds(coordinator, "together", plan(quorum=0.5, late_rounds=1), settings)
    play(coordinator, owners, "site-a")
    clock.pass_hours(1)
    advance(coordinator, shared)
    numbers = [request.recipe.round.number for request in coordinator.open_requests("site-b")]
    assert sorted(numbers) == [0, 1]


def test_a_removed_member_is_not_awaited(coordinator: Coordinator, owners: dict[str, Owner]) -> None:
    shared = begin_rounds(coordinator, "together", plan(quorum=0.5), SETTINGS)
    play(coordinator, owners, "site-a")
    coordinator.files.members.remove("site-b")
    assert advance(coordinator, shared)[0].endswith("site-a averaged, without site-b")


class Killed(BaseException):
    """Simulates kill -9: no handler catches it."""


def killed_at(coordinator: Coordinator, owner: Owner, request: ExpertRequest) -> None:
    """Deliver, and die after the round has stored the weights and before the ledger entry."""
    log = coordinator._log

    def dying(state: str, *rest: str, **more: str) -> None:
        if state == "accepted":
            raise Killed
        log(state, *rest, **more)  # type: ignore[arg-type]

    coordinator._log = dying  # type: ignore[method-assign, assignment]
    with pytest.raises(Killed):
        deliver(coordinator, owner, request)
    coordinator._log = log  # type: ignore[method-assign]


def test_kills_of_the_coordinator_end_in_the_same_weights(
    tmp_path: Path, new_workspace: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills between a delivery and its verdict, after the last average, and after the generalist is written."""
    digests = []
    for kind in ("whole", "killed"):
        coordinator = Coordinator(Layout(new_workspace(tmp_path / kind, experts=())), now=clock)
        owners = {}
        for name, module in MODULES.items():
            owners[name] = owner = Owner(tmp_path / kind / f"state-{name}")
            coordinator.files.members.add(name, make_key(owner.state).public)
            owner.configure(OwnerSettings(private_text(tmp_path / f"{name}.jsonl", module)))
        shared = begin_rounds(coordinator, "together", plan("diloco"), SETTINGS)
        for number in range(ROUNDS):
            for name, owner in owners.items():
                request = open_request(coordinator, name)
                trained(coordinator, owner, request)
                if kind == "killed":
                    killed_at(coordinator, owner, request)
                    if name == "site-b":  # the round is closed before the owner asks again
                        for what in (
                            f"{round_keeper.__name__}._write_generalist",
                            f"{SharedModel.__module__}.SharedModel.finish",
                        ):
                            with monkeypatch.context() as patch:
                                patch.setattr(what, dies)
                                with nullcontext() if number < ROUNDS - 1 else pytest.raises(Killed):
                                    advance(coordinator, shared)
                assert deliver(coordinator, owner, request) is None
            advance(coordinator, SharedModel(shared.root))
        assert shared.is_finished
        folder = coordinator.layout.generalists / "together"
        assert verify(folder) == []
        digests.append((read_manifest(folder).digest, read_manifest(folder).config, read_manifest(folder).data))
    assert digests[0] == digests[1]


def dies(*_: object) -> None:
    raise Killed


def test_invalid_shared_models_are_refused_before_any_request(
    coordinator: Coordinator, owners: dict[str, Owner]
) -> None:
    with pytest.raises(UserError, match="320 tokens are 10 steps of 32, too few for 11 rounds"):
        begin_rounds(coordinator, "together", plan(), replace(SETTINGS, total=11))
    stranger = RoundPlan(("site-a", "eve"), "diloco")
    with pytest.raises(UserError, match="eve"):
        begin_rounds(coordinator, "together", stranger, SETTINGS)
    (coordinator.layout.generalists / "taken").mkdir(parents=True)
    with pytest.raises(UserError, match="the name 'taken' is taken by"):
        begin_rounds(coordinator, "taken", plan(), SETTINGS)
    assert not list(coordinator.files.root.glob("requests/*"))
    begin_rounds(coordinator, "together", plan(), SETTINGS)
    with pytest.raises(UserError, match="'together' is being trained with other owners or settings"):
        begin_rounds(coordinator, "together", plan("diloco"), SETTINGS)


def test_the_round_keeper_reports_each_event_once(coordinator: Coordinator, owners: dict[str, Owner]) -> None:
    begin_rounds(coordinator, "together", plan(), SETTINGS)
    recorder = Recorder()
    told = recorder.lines
    stop = threading.Event()
    keeper = threading.Thread(target=keep_rounds, args=(coordinator, recorder, stop, 0.05))
    keeper.start()
    try:
        for _ in range(ROUNDS):
            while not all(coordinator.open_requests(name) for name in owners):
                stop.wait(0.05)
            play(coordinator, owners)
        while not told or "finished" not in told[-1]:
            stop.wait(0.05)
    finally:
        stop.set()
        keeper.join()
    assert [line.partition(":")[0] for line in told] == [
        "round 1 of 2 of 'together'",
        "round 2 of 2 of 'together'",
        "round 2 of 2 of 'together'",
        "'together' is finished",
    ]


@pytest.mark.parametrize(
    "changed",
    [
        {"number": 2},
        {"number": -1},
        {"total": 0},
        {"steps": 0},
        {"steps": True},
        {"rounds": "../../x"},
        {"model": "../x"},
        {"model": 3},
        {"number": 1.0},
    ],
)
def test_an_owner_refuses_an_invalid_round(changed: dict[str, object]) -> None:
    recipe = Recipe("all", round=RoundOf("together", "0" * 16, 1, 2, 5))
    content = recipe.as_json()
    assert Recipe.of_json(content) == recipe
    assert "round" not in Recipe("all").as_json()  # digests of other recipes are what they were
    with pytest.raises(UserError):
        Recipe.of_json({**content, "round": {**content["round"], **changed}})
    with pytest.raises(UserError):
        Recipe.of_json({**content, "round": {**content["round"], "more": 1}})


def test_averaging_rules_persist_on_disk(coordinator: Coordinator, owners: dict[str, Owner]) -> None:
    rules = AveragingRules(max_change=0.5)
    shared = begin_rounds(coordinator, "together", plan(rules=rules), SETTINGS)
    assert SharedModel(shared.root).rounds.plan.rules == rules
    assert shared.rounds.open.deadline - timedelta(hours=1) == coordinator.now()
