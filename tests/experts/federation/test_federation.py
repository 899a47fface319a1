"""From a request to an accepted expert, and every reason for a refusal."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_members import BTM, FLEXOLMO, LORA, MODULES, PROMPT, Clock, hand_in, trained
from safetensors.torch import load_file, save_file

from expertctl import UserError, Workspace, load_model, verify
from expertctl.core.artefacts.digests import digest_of_tensors, digests_of_folder
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.statements import DataStatement, DomainStatement
from expertctl.experts.federation.coordinator.coordinator import MOST_REFUSALS, Coordinator
from expertctl.experts.federation.coordinator.owner_status import owner_statuses
from expertctl.experts.federation.coordinator.storage import QUARANTINED
from expertctl.experts.federation.judging.acceptance import HeldOut
from expertctl.experts.federation.judging.refusal import RefusalCode
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.owner.recipes import recipe_of
from expertctl.experts.federation.protocol.delivery import SignedStatement, Statement, make_delivery
from expertctl.experts.federation.protocol.parts import parts_of
from expertctl.experts.federation.protocol.requests import ExpertRequest, Recipe
from expertctl.experts.text.corpora import two_digits

NewOwner = Callable[[str], Owner]


def ask(coordinator: Coordinator, clock: Clock, *names: str, recipe: Recipe = BTM) -> list[ExpertRequest]:
    return coordinator.ask(names, recipe, clock() + timedelta(hours=48))


# --- what goes well ---


@pytest.mark.parametrize("recipe", [BTM, FLEXOLMO, LORA, PROMPT], ids=["btm", "flexolmo", "lora", "prompt"])
def test_two_owners_train_apart_and_their_experts_merge(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock, recipe: Recipe
) -> None:
    owners = {name: new_owner(name) for name in MODULES}
    for request in ask(coordinator, clock, *owners, recipe=recipe):
        owner = owners[request.owner]
        trained(coordinator, owner, request)
        assert owner.progress(request).state == "ready"
        signed = owner.delivery(request)
        assert hand_in(coordinator, owner.delivery_folder(request), request, signed) is None
        assert coordinator.finish(request) is None  # told twice, done once
        assert coordinator.begin(request, signed) == {file.name: [] for file in signed.statement.files}
    assert {status.state for status in owner_statuses(coordinator)} == {"accepted"}
    assert ask(coordinator, clock, *owners, recipe=recipe) == []
    workspace = Workspace(coordinator.layout.root)
    assert workspace.layout.finished_experts() == sorted(owners)
    for name in owners:
        assert verify(workspace.experts / name) == []
    method = "flexolmo" if recipe is FLEXOLMO else "ensemble" if recipe is PROMPT else "average"
    workspace.merge("together", method=method, options={"prior": "uniform"} if recipe is PROMPT else {})
    model, _ = load_model(workspace.generalists / "together")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_delivery_holds_only_what_the_review_shows(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a", recipe=FLEXOLMO)
    expert = trained(coordinator, owner, request)
    review = owner.review(request)
    folder = owner.delivery_folder(request)
    assert set(review.files) == {path.name for path in folder.iterdir()} - {"delivery.json"}
    assert set(review.tensors) >= set(load_file(folder / "model.safetensors"))
    exact = read_manifest(expert).domains["site-a"]
    counts = (two_digits(count) for count in (exact.documents, exact.tokens, exact.bytes))
    assert review.data.domains == {"site-a": DomainStatement(*counts, rounded=True)}
    crossed = b"".join(path.read_bytes() for path in folder.iterdir())
    lines = [line.strip() for line in (owner.settings().data).read_text().split("\\n") if len(line.strip()) > 20]
    assert len(lines) > 50
    assert not [line for line in lines if line.encode() in crossed]
    private = (str(exact.digest), str(owner.state), str(owner.settings().data), "site-a.jsonl")
    places = [word for word in (socket.gethostname(), f"/{getpass.getuser()}/") if len(word) > 5]
    assert not [word for word in (*private, *places) if word.encode() in crossed]


@pytest.mark.parametrize(("count", "told"), [(0, 0), (7, 7), (12, 12), (12345, 12000), (995, 1000), (19999, 20000)])
def test_counts_are_rounded_to_two_significant_digits(count: int, told: int) -> None:
    assert two_digits(count) == told


def test_coordinator_and_owner_keep_their_state_across_restarts(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a")
    trained(coordinator, owner, request)
    signed = owner.delivery(request)
    folder = owner.delivery_folder(request)
    wanted = coordinator.begin(request, signed)
    assert isinstance(wanted, dict)
    first = signed.statement.files[0]
    coordinator.files.put(request.id, first.name, 0, (folder / first.name).read_bytes())
    again = Coordinator(coordinator.layout, now=clock)
    owner = Owner(owner.state)
    assert [request.id for request in again.open_requests("site-a")] == [request.id]
    assert owner.delivery(request) == signed
    left = again.begin(request, signed)
    assert isinstance(left, dict)
    assert left[first.name] == []
    with pytest.raises(UserError, match="parts of"):
        again.finish(request)
    assert hand_in(again, folder, request, signed) is None


def test_the_status_shows_a_request_that_the_owners_node_did_not_take(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a")
    coordinator.files.record_handout(request.id, "NOT_TAKEN", coordinator.now())
    assert owner_statuses(coordinator)[0].detail == "the owner's node replied NOT_TAKEN"
    coordinator.files.record_handout(request.id, "TAKEN", coordinator.now())
    assert owner_statuses(coordinator)[0].detail == ""


def test_a_late_owner_can_deliver_after_a_renewed_request(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a")
    trained(coordinator, owner, request)
    clock.pass_hours(49)
    assert coordinator.open_requests("site-a") == []
    signed = owner.delivery(request)
    refusal = hand_in(coordinator, owner.delivery_folder(request), request, signed)
    assert refusal is not None
    assert refusal.code is RefusalCode.LATE
    (renewed,) = ask(coordinator, clock, "site-a")
    assert renewed.id == request.id
    assert renewed.deadline > request.deadline
    assert hand_in(coordinator, owner.delivery_folder(renewed), renewed, signed) is None


def test_a_seed_in_a_local_folder_is_used(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock, tmp_path: Path
) -> None:
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a")
    owner.take(request)
    shutil.copytree(coordinator.layout.seed, tmp_path / "copy")
    assert read_manifest(owner.seeds.copy(request, tmp_path / "copy")).digest == request.seed
    other = tmp_path / "other"
    shutil.copytree(coordinator.layout.seed, other)
    (other / "config.json").write_text("{}")
    fresh = Owner(tmp_path / "fresh")
    with pytest.raises(UserError, match=r"config.json differs from the requested seed's"):
        fresh.seeds.copy(request, other)


# --- what an owner does not do ---


def test_an_owner_refuses_requests_for_others_and_forbidden_settings(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner, other = new_owner("site-a"), new_owner("site-b")
    (request,) = ask(coordinator, clock, "site-a")
    with pytest.raises(UserError, match="for another key"):
        other.take(request)
    for options in ({"embedding": "/home/you/model"}, {"embedding": "~/x"}, {"public": "..\\x"}):
        with pytest.raises(UserError, match="which only the owner may choose"):
            owner.take(replace(request, recipe=Recipe("flexolmo", options)))
    with pytest.raises(UserError, match="protects nobody"):
        owner.take(replace(request, recipe=replace(BTM, privacy={"epsilon": 8, "delta": 1e-6, "noise": "seeded"})))
    assert owner.requests() == []


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (lambda owner: owner.settings().data.write_text("{}"), "DATA"),
        (lambda owner: owner.settings().data.write_text('{"text": "a"}\n{"text": "b"}\n'), "DATA"),
    ],
)
def test_failures_at_an_owner_are_reported_as_codes_only(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock, break_it: Any, code: str
) -> None:
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a")
    break_it(owner)
    with pytest.raises(UserError):
        trained(coordinator, owner, request)
    progress = owner.progress(request)
    assert (progress.state, progress.code) == ("failed", code)
    coordinator.files.record_progress(request.id, progress, coordinator.now())
    assert owner_statuses(coordinator)[0].progress == progress


# --- what a coordinator does not take ---


@pytest.fixture
def ready(coordinator: Coordinator, new_owner: NewOwner, clock: Clock) -> tuple[Coordinator, Owner, ExpertRequest]:
    """Return a coordinator and an owner whose FlexOlmo expert is trained and not delivered."""
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a", recipe=FLEXOLMO)
    trained(coordinator, owner, request)
    owner.delivery(request)
    return coordinator, owner, request


def rewritten(
    owner: Owner, request: ExpertRequest, change: Callable[[Path], None], /, **manifest: Any
) -> SignedStatement:
    """Alter a delivery, make it consistent again as a dishonest owner would, and return a new signed statement."""
    folder = owner.delivery_folder(request)
    for path in list(folder.iterdir()):  # they share the expert's bytes
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    change(folder)
    signed = SignedStatement.read(folder)
    (folder / "delivery.json").unlink()
    tensors, files = digests_of_folder(folder)
    made = replace(read_manifest(folder), tensors=tensors, files=files, digest=digest_of_tensors(tensors), **manifest)
    made.write(folder)
    names = [file.name for file in signed.statement.files]
    statement = replace(signed.statement, expert=made.digest, files=tuple(parts_of(folder / name) for name in names))
    return SignedStatement(statement, owner.key().sign(statement.signed_bytes))


def with_tensors(
    change: Callable[[dict[str, torch.Tensor]], None], file: str = "model.safetensors"
) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return apply


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("up_proj.weight"))


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)][0, 0] = float("nan")


def scale_up(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] *= 10


def cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] = tensors[first(tensors)][:-1].clone()


def halve(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] = tensors[first(tensors)].half()


def add_stranger(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.backdoor.weight"] = torch.ones(2)


def scaled_by(factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first(tensors)] *= factor

    return change


def keep_one(tensors: dict[str, torch.Tensor]) -> None:
    kept = first(tensors)
    for name in set(tensors) - {kept}:
        del tensors[name]


def move_frozen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.zeros(300, 16)


def rows_of(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["rows"] = torch.full_like(tensors["rows"], value)

    return change


def add_file(folder: Path) -> None:
    """Add a file of tensors that the trainer does not write, to the statement too."""
    save_file({"rows": torch.ones(2)}, folder / "extra.safetensors")
    path = folder / "delivery.json"
    content = json.loads(path.read_text())
    content["statement"]["files"].append(parts_of(folder / "extra.safetensors").as_json())
    path.write_text(json.dumps(content))


ROUTER = "router.safetensors"


@pytest.mark.parametrize(
    ("change", "manifest", "code"),
    [
        (with_tensors(scaled_by(3.5)), {}, RefusalCode.NORM),
        (with_tensors(scaled_by(0.0)), {}, RefusalCode.NORM),
        (with_tensors(scaled_by(-1.0)), {}, RefusalCode.NORM),
        (with_tensors(scaled_by(1e-41)), {}, RefusalCode.NORM),
        (with_tensors(keep_one), {}, RefusalCode.FILES),
        (add_file, {}, RefusalCode.FILES),
        (with_tensors(rows_of(99.0), ROUTER), {}, RefusalCode.NORM),
        (with_tensors(lambda tensors: tensors.update(rows=tensors["rows"].long()), ROUTER), {}, RefusalCode.DTYPES),
        (
            with_tensors(lambda tensors: tensors.update(rows=tensors["rows"].T.contiguous()), ROUTER),
            {},
            RefusalCode.SHAPES,
        ),
        (with_tensors(lambda tensors: tensors.update(other=torch.ones(2)), ROUTER), {}, RefusalCode.SHAPES),
        (with_tensors(lambda tensors: tensors.pop("biases"), ROUTER), {}, RefusalCode.SHAPES),
        (with_tensors(lambda tensors: tensors.update(biases=tensors["biases"] + 1), ROUTER), {}, RefusalCode.NORM),
        (lambda folder: None, {"tokenizer": "0" * 64}, RefusalCode.MANIFEST),
        (lambda folder: None, {"metrics": {"loss": "low"}}, RefusalCode.MANIFEST),
        (lambda folder: None, {"metrics": {"loss": float("inf")}}, RefusalCode.MANIFEST),
        (lambda folder: None, {"metrics": {"loss": 10**400}}, RefusalCode.MANIFEST),
        (lambda folder: None, {"licence": "\x1b[2J"}, RefusalCode.MANIFEST),
        (lambda folder: None, {"licence": "x" * 301}, RefusalCode.MANIFEST),
        (lambda folder: None, {"name": "site-b"}, RefusalCode.MANIFEST),
        (
            lambda folder: None,
            {"data": DataStatement({"site-a": DomainStatement(10**9, 10**12)})},
            RefusalCode.MANIFEST,
        ),
        (with_tensors(set_nan), {}, RefusalCode.NOT_FINITE),
        (with_tensors(scale_up), {}, RefusalCode.NORM),
        (with_tensors(cut), {}, RefusalCode.SHAPES),
        (with_tensors(halve), {}, RefusalCode.DTYPES),
        (with_tensors(add_stranger), {}, RefusalCode.SHAPES),
        (with_tensors(move_frozen), {}, RefusalCode.FROZEN),
        (with_tensors(lambda tensors: tensors.clear()), {}, RefusalCode.FILES),
        (with_tensors(rows_of(float("inf")), "router.safetensors"), {}, RefusalCode.NOT_FINITE),
        (with_tensors(rows_of(1e6), "router.safetensors"), {}, RefusalCode.NORM),
        (lambda folder: None, {"owner": "site-b"}, RefusalCode.MANIFEST),
        (lambda folder: None, {"trainable": "all"}, RefusalCode.MANIFEST),
        (lambda folder: None, {"parents": ()}, RefusalCode.MANIFEST),
        (lambda folder: (folder / "run.json").write_text("[]"), {}, RefusalCode.DIGEST),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 64), {}, RefusalCode.DIGEST),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_an_invalid_expert_is_quarantined_with_a_reason(
    ready: tuple[Coordinator, Owner, ExpertRequest],
    change: Callable[[Path], None],
    manifest: dict[str, Any],
    code: RefusalCode,
) -> None:
    coordinator, owner, request = ready
    good = SignedStatement.read(owner.delivery_folder(request))
    try:
        signed = rewritten(owner, request, change, **manifest)
    except UserError:  # it is no safetensors file any more: deliver it as it is
        folder = owner.delivery_folder(request)
        files = tuple(parts_of(folder / file.name) for file in good.statement.files)
        statement = replace(good.statement, files=files)
        signed = SignedStatement(statement, owner.key().sign(statement.signed_bytes))
    refusal = hand_in(coordinator, owner.delivery_folder(request), request, signed)
    assert refusal is not None
    assert refusal.code is code
    assert coordinator.layout.finished_experts() == []
    (status,) = owner_statuses(coordinator)
    assert status.state == "refused"
    assert "\n" not in status.detail
    (kept,) = (coordinator.files.root / "quarantine").iterdir()
    assert json.loads((kept / "reason.json").read_text())["code"] == code.name
    # the good one is still welcome
    shutil.rmtree(owner.delivery_folder(request))
    again = owner.delivery(request)
    assert hand_in(coordinator, owner.delivery_folder(request), request, again) is None
    assert coordinator.layout.finished_experts() == ["site-a"]


ADAPTER = "adapter_model.safetensors"


def factor(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("up_proj.lora_B.weight"))


def in_factor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return with_tensors(lambda tensors: tensors.update({factor(tensors): change(tensors[factor(tensors)])}), ADAPTER)


def set_alpha(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1000}))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (in_factor(lambda b: b + 29), RefusalCode.NORM),
        (in_factor(lambda b: b + 31), RefusalCode.NORM),
        (in_factor(lambda b: b * float("nan")), RefusalCode.NOT_FINITE),
        (in_factor(lambda b: b.half()), RefusalCode.DTYPES),
        (in_factor(lambda b: b[:-1].clone()), RefusalCode.SHAPES),
        (with_tensors(lambda tensors: tensors.pop(factor(tensors)), ADAPTER), RefusalCode.SHAPES),
        (with_tensors(add_stranger, ADAPTER), RefusalCode.SHAPES),
        (set_alpha, RefusalCode.MANIFEST),
        (add_file, RefusalCode.FILES),
    ],
    ids=["change", "range", "nan", "dtype", "shape", "missing", "stranger", "config", "file"],
)
def test_an_invalid_adapter_is_refused(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock, change: Callable[[Path], None], code: RefusalCode
) -> None:
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a", recipe=LORA)
    trained(coordinator, owner, request)
    owner.delivery(request)
    signed = rewritten(owner, request, change)
    refusal = hand_in(coordinator, owner.delivery_folder(request), request, signed)
    assert refusal is not None
    assert refusal.code is code, refusal
    assert coordinator.layout.finished_experts() == []


def set_tokens(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "num_virtual_tokens": 2}))


def in_prompt(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    name = "prompt_embeddings"
    return with_tensors(lambda tensors: tensors.update({name: change(tensors[name])}), ADAPTER)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (in_prompt(lambda rows: rows + 2e4), RefusalCode.NORM),
        (in_prompt(lambda rows: rows * float("nan")), RefusalCode.NOT_FINITE),
        (in_prompt(lambda rows: rows[:-1].clone()), RefusalCode.SHAPES),
        (set_tokens, RefusalCode.MANIFEST),
    ],
    ids=["range", "nan", "shape", "config"],
)
def test_an_invalid_prompt_is_refused(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock, change: Callable[[Path], None], code: RefusalCode
) -> None:
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a", recipe=PROMPT)
    trained(coordinator, owner, request)
    owner.delivery(request)
    signed = rewritten(owner, request, change)
    refusal = hand_in(coordinator, owner.delivery_folder(request), request, signed)
    assert refusal is not None
    assert refusal.code is code, refusal


def test_owners_are_not_asked_for_prompts_behind_others() -> None:
    with pytest.raises(UserError, match="'progressive_prompts' reads law, which owners do not have"):
        recipe_of("progressive_prompts", {"earlier": "law"})


def test_targets_that_the_seed_does_not_have_are_refused_before_owners_are_asked(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    new_owner("site-a")
    with pytest.raises(UserError, match="no linear layer matches target 'c_attn'"):
        ask(coordinator, clock, "site-a", recipe=replace(LORA, options={"targets": "c_attn"}))
    assert coordinator.open_requests("site-a") == []


def test_refusals_of_a_request_are_bounded_until_the_owner_is_asked_again(
    ready: tuple[Coordinator, Owner, ExpertRequest], clock: Clock
) -> None:
    coordinator, owner, request = ready
    good = SignedStatement.read(owner.delivery_folder(request))
    bad = SignedStatement(good.statement, "AAAA")
    lines = len(coordinator.files.ledger.entries())
    codes = [coordinator.begin(request, bad).code for _ in range(MOST_REFUSALS + 5)]  # type: ignore[union-attr]
    assert codes == [RefusalCode.SIGNATURE] * MOST_REFUSALS + [RefusalCode.TOO_OFTEN] * 5
    assert len(coordinator.files.ledger.entries()) == lines + MOST_REFUSALS
    coordinator.ask(["site-a"], request.recipe, clock() + timedelta(hours=5))
    assert hand_in(coordinator, owner.delivery_folder(request), request, good) is None


def test_only_the_latest_refused_deliveries_of_a_request_are_kept(
    ready: tuple[Coordinator, Owner, ExpertRequest],
) -> None:
    coordinator, owner, request = ready
    for _ in range(QUARANTINED + 2):
        shutil.rmtree(owner.delivery_folder(request), ignore_errors=True)
        owner.delivery(request)
        signed = rewritten(owner, request, with_tensors(set_nan))
        assert hand_in(coordinator, owner.delivery_folder(request), request, signed) is not None
    kept = sorted(path.name for path in (coordinator.files.root / "quarantine").iterdir())
    assert kept == [f"{request.id}-{number}" for number in (2, 3, 4)]


def test_an_account_of_thousands_of_values_is_not_parsed(ready: tuple[Coordinator, Owner, ExpertRequest]) -> None:
    _, owner, request = ready
    content = SignedStatement.read(owner.delivery_folder(request)).as_json()
    content["statement"]["privacy"] = {"history": [[0.1, 0.1, 1]] * 100_000}
    with pytest.raises(UserError, match="more than 1000 values"):
        SignedStatement.of_json(content)


def test_a_known_request_that_asks_for_something_else_is_refused(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner = new_owner("site-a")
    (request,) = coordinator.ask(["site-a"], BTM, clock() + timedelta(hours=1))
    owner.take(request)
    owner.take(replace(request, deadline=request.deadline + timedelta(hours=1)))
    larger = replace(request, recipe=replace(BTM, training={**BTM.training, "tokens": 5_000_000}))
    with pytest.raises(UserError, match="the identifier of another one that asked for something else"):
        owner.take(larger)
    for name, value in {"threads": 10**15, "batch_size": 10**9}.items():
        changed = replace(request, id="f" * 16, recipe=replace(BTM, training={**BTM.training, name: value}))
        with pytest.raises(UserError, match=f"sets '{name}' to"):
            owner.take(changed)


def test_a_seed_with_a_huge_manifest_is_not_read(coordinator: Coordinator, new_owner: NewOwner, clock: Clock) -> None:
    owner = new_owner("site-a")
    (request,) = coordinator.ask(["site-a"], BTM, clock() + timedelta(hours=1))
    shutil.copytree(coordinator.layout.seed, owner.state / "pack")
    (owner.state / "pack" / "seed.json").unlink()
    (owner.state / "pack" / "seed.json").touch()
    os.truncate(owner.state / "pack" / "seed.json", 3 << 29)
    with pytest.raises(UserError, match="the seed is refused"):
        owner.seeds.copy(request, owner.state / "pack")


def restated(signed: SignedStatement, key: Any, **change: Any) -> SignedStatement:
    statement: Statement = replace(signed.statement, **change)
    return SignedStatement(statement, key.sign(statement.signed_bytes))


def test_forged_statements_are_refused_before_any_upload(
    ready: tuple[Coordinator, Owner, ExpertRequest], new_owner: NewOwner, clock: Clock
) -> None:
    coordinator, owner, request = ready
    other = new_owner("site-b")
    good = SignedStatement.read(owner.delivery_folder(request))
    own = owner.key()
    file = good.statement.files[0]
    huge = replace(file, size=10 * 2**30, part_size=10 * 2**30, parts=("0" * 64,))
    cases = {
        "forged": (
            SignedStatement(good.statement, other.key().sign(good.statement.signed_bytes)),
            RefusalCode.SIGNATURE,
        ),
        "unsigned": (SignedStatement(good.statement, ""), RefusalCode.SIGNATURE),
        "altered": (
            SignedStatement(replace(good.statement, owner="site-b"), good.signature),
            RefusalCode.SIGNATURE,
        ),
        "other owner": (restated(good, own, owner="site-b"), RefusalCode.SOMEONE_ELSES),
        "other request": (restated(good, own, request="0" * 16), RefusalCode.SOMEONE_ELSES),
        "other seed": (restated(good, own, seed="0" * 64), RefusalCode.SOMEONE_ELSES),
        "other recipe": (restated(good, own, recipe="0" * 64), RefusalCode.SOMEONE_ELSES),
        "no files": (restated(good, own, files=()), RefusalCode.FILES),
        "more files": (
            restated(good, own, files=(*good.statement.files, replace(file, name="x.py"))),
            RefusalCode.FILES,
        ),
        "too large": (restated(good, own, files=(huge, *good.statement.files[1:])), RefusalCode.TOO_LARGE),
    }
    for name, (signed, code) in cases.items():
        refusal = coordinator.begin(request, signed)
        assert not isinstance(refusal, dict), name
        assert refusal.code is code, name
    with pytest.raises(UserError, match="there is no such request"):
        coordinator.request_of("site-b", request.id)
    with pytest.raises(UserError, match="was not announced"):
        coordinator.files.put(request.id, file.name, 0, b"")
    assert not any((coordinator.files.root / "incoming").iterdir())
    assert hand_in(coordinator, owner.delivery_folder(request), request, good) is None


def test_a_replay_is_refused(ready: tuple[Coordinator, Owner, ExpertRequest], clock: Clock) -> None:
    coordinator, owner, request = ready
    good = SignedStatement.read(owner.delivery_folder(request))
    assert hand_in(coordinator, owner.delivery_folder(request), request, good) is None
    longer = Recipe("flexolmo", FLEXOLMO.options, {**FLEXOLMO.training, "tokens": 640})
    (second,) = ask(coordinator, clock, "site-a", recipe=longer)
    refusal = coordinator.begin(second, good)
    assert not isinstance(refusal, dict)
    assert refusal.code is RefusalCode.SOMEONE_ELSES
    signed = restated(good, owner.key(), request=second.id, recipe=longer.digest)
    refusal = coordinator.begin(second, signed)
    assert not isinstance(refusal, dict)
    assert refusal.code is RefusalCode.REPLAY
    assert coordinator.layout.finished_experts() == ["site-a"]


def test_an_expert_with_a_high_loss_on_public_text_is_refused(
    ready: tuple[Coordinator, Owner, ExpertRequest],
) -> None:
    coordinator, owner, request = ready
    signed = SignedStatement.read(owner.delivery_folder(request))
    seen: list[Path] = []

    def measure(seed: Path, folder: Path) -> HeldOut:
        seen.append(folder)
        load_model(folder)  # it is a whole artefact, within the workspace
        return HeldOut(2.0, [float("nan"), 4.1, 3.9][len(seen) - 1])

    judge = Coordinator(coordinator.layout, measure=measure, now=coordinator.now)
    for _ in range(2):
        refusal = hand_in(judge, owner.delivery_folder(request), request, signed)
        assert refusal is not None
        assert refusal.code is RefusalCode.HELD_OUT
    assert hand_in(judge, owner.delivery_folder(request), request, signed) is None
    assert len(list((coordinator.files.root / "quarantine").iterdir())) == 2


def test_less_privacy_than_requested_is_refused(coordinator: Coordinator, new_owner: NewOwner, clock: Clock) -> None:
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a")
    trained(coordinator, owner, request)
    private = replace(request, recipe=replace(BTM, privacy={"epsilon": 8.0, "delta": 1e-6}))
    path = coordinator.files.root / "requests" / f"{request.id}.json"
    path.write_text(json.dumps(private.as_json()))
    (owner.state / "requests" / f"{request.id}.json").write_text(json.dumps(private.as_json()))
    with pytest.raises(UserError, match="with less privacy than the request"):
        owner.delivery(private)  # an honest owner's machine does not even sign it
    expert = owner.expert_folder(private)
    signed = make_delivery(expert, private, owner.key(), owner.delivery_folder(private))
    refusal = hand_in(coordinator, owner.delivery_folder(private), private, signed)
    assert refusal is not None
    assert refusal.code is RefusalCode.PRIVACY


def test_requested_privacy_is_applied_stated_and_checked(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner = new_owner("site-a")
    recipe = replace(FLEXOLMO, privacy={"epsilon": 8.0, "delta": 1e-5})
    (request,) = ask(coordinator, clock, "site-a", recipe=recipe)
    trained(coordinator, owner, request)
    assert owner.progress(request).loss is None
    spent = owner.review(request).privacy
    assert spent is not None
    assert spent.epsilon is not None
    assert 0 < spent.epsilon <= 8
    assert spent.delta == 1e-5
    signed = owner.delivery(request)
    assert hand_in(coordinator, owner.delivery_folder(request), request, signed) is None
    privacy = read_manifest(coordinator.layout.experts / "site-a").data.privacy
    assert privacy == spent


def test_vectors_that_training_left_as_they_were_need_not_be_delivered(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock
) -> None:
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a")
    trained(coordinator, owner, request)
    owner.delivery(request)

    def drop_norms(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if tensors[name].dim() == 1]:
            del tensors[name]

    signed = rewritten(owner, request, with_tensors(drop_norms))
    assert hand_in(coordinator, owner.delivery_folder(request), request, signed) is None


def test_a_kill_between_taking_an_expert_and_its_entry_leaves_no_second_one(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = new_owner("site-a")
    (request,) = ask(coordinator, clock, "site-a")
    trained(coordinator, owner, request)
    signed = owner.delivery(request)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    log = coordinator._log
    monkeypatch.setattr(
        coordinator, "_log", lambda state, *rest, **more: (killed if state == "accepted" else log)(state, *rest, **more)
    )
    with pytest.raises(KeyboardInterrupt):
        hand_in(coordinator, owner.delivery_folder(request), request, signed)
    assert coordinator.layout.finished_experts() == ["site-a"]
    monkeypatch.undo()
    assert hand_in(coordinator, owner.delivery_folder(request), request, signed) is None
    assert coordinator.layout.finished_experts() == ["site-a"]
    assert coordinator.files.ledger.accepted_names() == {"site-a"}


@pytest.mark.parametrize("trains", ["model.layers.{0,1}.mlp.*", ",".join(f"model.layers.{n}.mlp.*" for n in range(30))])
def test_a_request_that_owners_could_not_read_is_not_asked(
    coordinator: Coordinator, new_owner: NewOwner, clock: Clock, trains: str
) -> None:
    new_owner("site-a")
    with pytest.raises(UserError, match="the field 'trains' of the recipe"):
        ask(coordinator, clock, "site-a", recipe=replace(BTM, trains=trains))
    assert coordinator.open_requests("site-a") == []
