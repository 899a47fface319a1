"""Failure drills of a federation with real processes on loopback: accepted work stays, everything else resumes."""

from __future__ import annotations

import calendar
import configparser
import cProfile
import ftplib
import gettext
import heapq
import inspect
import optparse
import pprint
import random
import sched
import shutil
import smtplib
import ssl
import statistics
import subprocess
import tarfile
import textwrap
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_processes import Federation, Relay, distinctive_lines, kill_work, wait_until, work_pid
from safetensors.torch import load_file, save_file

from expertctl import Workspace, load_model, verify
from expertctl.core.artefacts.digests import digest_of_tensors, digests_of_folder
from expertctl.core.artefacts.files import is_alive, read_json
from expertctl.core.manifests.manifest import read_manifest
from expertctl.experts.federation.coordinator.owner_status import owner_statuses
from expertctl.experts.federation.coordinator.round_keeper import begin_rounds
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.owner.work import work
from expertctl.experts.federation.protocol.delivery import SignedStatement, make_delivery
from expertctl.experts.federation.protocol.parts import parts_of, read_part
from expertctl.experts.federation.protocol.requests import ExpertRequest, Recipe
from expertctl.experts.federation.rounds.rounds import RoundPlan
from expertctl.experts.federation.rounds.shared_model import SharedSettings
from expertctl.plugins.flower.coordinator.superlink import APP
from expertctl.plugins.flower.owner.coordinator_client import CoordinatorClient
from expertctl.plugins.flower.processes.child import environment, flower_command

pytestmark = [pytest.mark.slow, pytest.mark.federation, pytest.mark.timeout(400)]
SHORT = {"tokens": 640, "sequence_length": 16, "batch_size": 2}
LONG = {**SHORT, "tokens": 96_000, "checkpoint_seconds": 1.0}
FLEXOLMO = Recipe("flexolmo", {"embedding": "none"}, SHORT)
BTM = Recipe("all", {}, SHORT)
FLEXOLMO_LONG = Recipe("flexolmo", {"embedding": "none"}, LONG)
"""Three thousand steps."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, new_workspace: Any) -> Iterator[Federation]:
    """One coordinator for all drills; each drill has its own owners and must leave the coordinator working."""
    root = tmp_path_factory.mktemp("federation")
    hub = new_workspace(root / "hub", experts=(), config="training: {sequence_length: 16}\n")
    running = Federation(root, hub)
    yield running
    running.close()


def client_of(federation: Federation, owner: Owner) -> CoordinatorClient:
    return CoordinatorClient(f"127.0.0.1:{federation.port}", federation.ca, owner.key())


def has_begun(owner: Owner, request: ExpertRequest) -> Callable[[], bool]:
    path = owner.run_folder(request) / "progress.json"
    return lambda: path.is_file() and read_json(path)["step"] > 0


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def checkpoint_of(owner: Owner, request: ExpertRequest) -> int:
    """Return the step of a run's newest checkpoint."""
    return max((int(path.name[5:]) for path in owner.run_folder(request).rglob("step-*")), default=0)


# --- ends of processes ---


def test_a_coordinator_killed_after_one_of_three_deliveries_and_an_owner_killed_in_training(
    federation: Federation,
) -> None:
    """Includes an owner that never answers, deliveries to the restarted coordinator, and a merge of the accepted experts."""
    modules = {"first": textwrap, "second": statistics, "third": zipfile}
    owners = {name: federation.owner(name, module) for name, module in modules.items()}
    federation.owner("silent", calendar)
    recipes = {"first": FLEXOLMO, "second": FLEXOLMO_LONG, "third": FLEXOLMO_LONG}
    requests = {name: federation.ask(name, recipe) for name, recipe in recipes.items()}
    silent = federation.ask("silent", FLEXOLMO, seconds=1)
    joined = {name: federation.join(name) for name in modules}
    assert joined["first"].wait() == 0, joined["first"].output()
    first = content_of(federation.workspace / "experts" / "first")
    for name in ("second", "third"):
        wait_until(has_begun(owners[name], requests[name]), why=joined[name].output)
    wait_until(lambda: checkpoint_of(owners["third"], requests["third"]) > 10)

    federation.server.kill()  # after one of three
    joined["third"].kill()  # and one owner with its training
    kill_work(owners["third"], requests["third"])
    wait_until(lambda: not is_alive(str(work_pid(owners["third"], requests["third"]))))
    stopped_at = owners["third"].progress(requests["third"])
    assert (stopped_at.state, stopped_at.code) == ("failed", "STOPPED")
    assert stopped_at.step > 0
    before = owners["second"].progress(requests["second"]).step
    wait_until(lambda: owners["second"].progress(requests["second"]).step > before)  # nobody is needed for it
    wait_until(lambda: "the coordinator cannot be reached" in joined["second"].output())
    kept = checkpoint_of(owners["third"], requests["third"])

    federation.server.again()
    joined["third"].again()
    wait_until(lambda: owners["third"].progress(requests["third"]).step != stopped_at.step)
    assert owners["third"].progress(requests["third"]).step >= kept  # not from the start
    federation.wait_served(times=2)
    for name in ("second", "third"):
        assert joined[name].wait() == 0, joined[name].output()
    assert federation.accepted() == {"first": "first", "second": "second", "third": "third"}
    assert content_of(federation.workspace / "experts" / "first") == first
    asked = [entry.owner for entry in federation.coordinator.files.ledger.entries() if entry.state == "asked"]
    assert asked.count("first") == asked.count("second") == 1
    late = next(status for status in owner_statuses(federation.coordinator) if status.request == silent.id)
    assert (late.state, late.detail) == ("asked", "the deadline has passed")
    for request in requests.values():  # it was Flower that carried the requests
        assert read_json(federation.coordinator.files.root / "handed" / f"{request.id}.json")["code"] == "TAKEN"
    workspace = Workspace(federation.workspace)
    workspace.merge("together", method="flexolmo")
    model, _ = load_model(workspace.generalists / "together")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert verify(workspace.experts / "third") == []


@pytest.mark.timeout(900)
def test_twenty_kills_at_random_moments_lose_nothing_and_change_no_tensor(federation: Federation) -> None:
    """Of the coordinator, the owner's process and its training, against an owner with the same text that nobody disturbs."""
    source = random.Random(0)
    owners = {name: federation.owner(name, smtplib) for name in ("steady", "shaken")}
    requests = {name: federation.ask(name, FLEXOLMO_LONG) for name in owners}
    owners["steady"].take(requests["steady"])
    owners["steady"].seeds.copy(requests["steady"], federation.workspace / "seed")
    undisturbed = work(owners["steady"], requests["steady"])  # not delivered: the same expert twice would be a replay
    joined = federation.join("shaken")
    wait_until(has_begun(owners["shaken"], requests["shaken"]), why=joined.output)
    killed = []
    for _ in range(20):
        time.sleep(source.uniform(0.1, 3.0))
        victim = source.choice(["coordinator", "owner", "training"])
        if victim == "coordinator":
            federation.server.kill()
            federation.server.again()
        elif victim == "owner" and joined.process.poll() is None:
            joined.kill()
            joined.again()
        elif victim == "training" and owners["shaken"].is_working(requests["shaken"]):
            kill_work(owners["shaken"], requests["shaken"])
        else:
            continue
        killed.append(victim)
    assert {"coordinator", "owner"} <= set(killed)
    assert joined.wait() == 0, joined.output()
    assert "shaken" in federation.accepted(), joined.output()
    delivered = federation.workspace / "experts" / "shaken"
    assert read_manifest(delivered).tensors == read_manifest(undisturbed).tensors
    assert verify(delivered) == []
    assert federation.coordinator.files.ledger.chain.audit().problems == ()


def test_traffic_and_coordinator_files_hold_no_line_of_the_owners_text(
    federation: Federation,
) -> None:
    """The relay decrypts the traffic with the coordinator's key, so it sees every byte, including Flower's."""
    folder = federation.ca.parent
    relay = Relay(federation.port, opened_by=(folder / "server.crt", folder / "server.key", federation.ca))
    owner = federation.owner("open", configparser)
    request = federation.ask("open", BTM)
    joined = federation.join("open", port=relay.port)
    assert joined.wait() == 0, joined.output()
    relay.close()
    seen = bytes(relay.seen)
    assert request.id.encode() in seen
    assert b"/v1/fleet/pull-messages" in seen  # Flower's traffic came this way
    assert (owner.delivery_folder(request) / "model.safetensors").read_bytes()[-4000:] in seen  # and the expert
    lines = distinctive_lines(federation.root / "open.jsonl")
    assert len(lines) > 100
    private = [str(owner.state).encode(), str(federation.root / "open.jsonl").encode(), b"work.log"]
    assert [line for line in (*lines, *private) if line in seen] == []
    files = [path for path in federation.workspace.rglob("*") if path.is_file()]
    assert any(path.name == "superlink.log" for path in files)
    kept = b"\0".join(path.read_bytes() for path in files)
    assert [line for line in (*lines, *private) if line in kept] == []


def test_rounds_of_a_shared_model_survive_the_coordinator_and_an_owner_in_training(
    federation: Federation,
) -> None:
    """DiLoCo over Flower: two owners, two rounds; kills in the first."""
    modules = {"left": sched, "right": heapq}
    owners = {name: federation.owner(name, module) for name, module in modules.items()}
    plan = RoundPlan(tuple(modules), "diloco", round_seconds=3600.0)
    training = {**SHORT, "tokens": 19_200, "checkpoint_seconds": 0.5}
    shared = begin_rounds(federation.coordinator, "both", plan, SharedSettings(2, training))
    seed = load_file(federation.workspace / "seed" / "model.safetensors")
    joined = {name: federation.join(name) for name in modules}
    for name, owner in owners.items():
        wait_until(lambda owner=owner: bool(owner.requests()), why=joined[name].output)
    (request,) = owners["left"].requests()
    state = owners["left"].shared_folder(request) / "state"
    wait_until(lambda: list(state.glob("step-*")), why=joined["left"].output)
    served = federation.server.output().count("owners can join")
    federation.server.kill()
    joined["left"].kill()
    kill_work(owners["left"], request)
    kept = max(int(path.name[5:]) for path in state.glob("step-*"))
    assert kept < 300  # in the first round
    federation.server.again()
    joined["left"].again()
    federation.wait_served(times=served + 1)
    for name in modules:
        assert joined[name].wait() == 0, joined[name].output()
    wait_until(lambda: shared.is_finished, why=federation.server.output)
    assert "round 1 of 2 of 'both': left and right averaged" in federation.server.output()
    assert [sorted(shared.rounds.report(number).shares) for number in range(2)] == [["left", "right"]] * 2
    folder = federation.workspace / "generalists" / "both"
    assert verify(folder) == []
    model, _ = load_model(folder)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    after = load_file(folder / "model.safetensors")
    assert any(not torch.equal(after[name], seed[name]) for name in seed)
    assert not state.exists()  # the last round is over


# --- links ---


def test_a_delivery_over_a_slow_link_with_three_cuts_repeats_few_bytes(
    federation: Federation,
) -> None:
    """Parts of 4 KiB of a small expert represent parts of 32 MiB of a large one."""
    owner = federation.owner("cut", cProfile)
    request = federation.ask("cut", BTM)
    owner.take(request)
    owner.seeds.copy(request, federation.workspace / "seed")
    work(owner, request)
    make_delivery(owner.expert_folder(request), request, owner.key(), owner.delivery_folder(request), part_size=4096)
    size = sum(file.size for file in owner.delivery(request).statement.files)
    relay = Relay(federation.port, bytes_per_second=100_000, cut_after=(30_000, 60_000, 90_000))
    joined = federation.join("cut", port=relay.port)
    assert joined.wait() == 0, joined.output()
    relay.close()
    assert len(relay.cuts) == 3
    assert "the coordinator cannot be reached" in joined.output()
    assert federation.accepted()["cut"] == "cut"
    assert relay.up < size + 150_000  # Flower's own messages among it


def test_a_delivery_resumes_after_a_full_disk_at_the_coordinator(federation: Federation) -> None:
    owner = federation.owner("full", ftplib)
    request = federation.ask("full", BTM)
    before = federation.accepted()
    federation.limit_files(40_000)
    joined = federation.join("full")
    wait_until(lambda: "the coordinator's disk is full" in joined.output(), why=joined.output)
    assert "no space left while writing" in federation.server.output()
    assert joined.process.poll() is None
    federation.limit_files(-1)
    assert joined.wait() == 0, joined.output()
    assert owner.outcome(request) == "accepted"
    assert federation.accepted() == {**before, "full": "full"}


# --- deliveries that are not taken ---


def deliver(client: CoordinatorClient, folder: Path, request_id: str, signed: SignedStatement) -> str:
    """Deliver a folder as an owner's process does, without its checks; return the verdict."""
    begun = client.begin(request_id, signed)
    if begun.refusal is not None:
        return begun.refusal
    for file in signed.statement.files:
        for index in begun.missing[file.name]:
            client.put(request_id, file, index, read_part(folder / file.name, file, index))
    while (verdict := client.finish(request_id)).state == "judging":
        time.sleep(0.2)
    return str(verdict.refusal or verdict.state)


def altered(
    owner: Owner, request: ExpertRequest, change: Callable[[dict[str, torch.Tensor]], None]
) -> tuple[Path, SignedStatement]:
    """Return a delivery with altered weights, self-consistent and signed by the owner."""
    folder = owner.state / "altered"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(owner.delivery_folder(request), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = read_manifest(folder)
    (folder / "delivery.json").unlink()
    (folder / "expert.json").unlink()
    tensors, files = digests_of_folder(folder)
    changed = replace(manifest, tensors=tensors, files=files, digest=digest_of_tensors(tensors))
    changed.write(folder)
    old = owner.delivery(request).statement
    names = [file.name for file in old.files]
    statement = replace(old, expert=changed.digest, files=tuple(parts_of(folder / name, 1 << 20) for name in names))
    return folder, SignedStatement(statement, owner.key().sign(statement.signed_bytes))


def not_finite(weights: dict[str, torch.Tensor]) -> None:
    next(iter(weights.values())).view(-1)[0] = float("nan")


def scaled(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.mul_(10)


def reshaped(weights: dict[str, torch.Tensor]) -> None:
    name = next(iter(weights))
    weights[name] = weights[name].reshape(-1)[:-1].clone()


def test_invalid_deliveries_are_refused_with_a_code_and_a_valid_one_is_accepted(
    federation: Federation,
) -> None:
    owner, other = federation.owner("bad", gettext), federation.owner("thief", pprint)
    request, theirs = federation.ask("bad", BTM), federation.ask("thief", BTM)
    owner.take(request)
    owner.seeds.copy(request, federation.workspace / "seed")
    work(owner, request)
    good = owner.delivery(request)
    client, thief = client_of(federation, owner), client_of(federation, other)
    before = federation.accepted()
    try:
        for change, code in ((not_finite, "NOT_FINITE"), (reshaped, "SHAPES"), (scaled, "NORM")):
            folder, signed = altered(owner, request, change)
            assert deliver(client, folder, request.id, signed) == code
        folder = owner.delivery_folder(request)
        forged = SignedStatement(good.statement, other.key().sign(good.statement.signed_bytes))
        assert deliver(client, folder, request.id, forged) == "SIGNATURE"
        assert deliver(thief, folder, theirs.id, good) in ("SIGNATURE", "SOMEONE_ELSES")
        mine = replace(good.statement, request=theirs.id, owner="thief")
        assert federation.accepted() == before
        assert deliver(client, folder, request.id, good) == "accepted"
        stolen = SignedStatement(mine, other.key().sign(mine.signed_bytes))  # what was accepted from somebody else
        assert deliver(thief, folder, theirs.id, stolen) == "REPLAY"
    finally:
        client.close()
        thief.close()
    assert federation.accepted() == {**before, "bad": "bad"}
    reasons = [read_json(path)["code"] for path in federation.coordinator.files.root.glob("quarantine/*/reason.json")]
    assert {"NOT_FINITE", "SHAPES", "NORM"} <= set(reasons)


# --- who gets in ---


def test_an_unregistered_key_is_refused_in_one_line(federation: Federation) -> None:
    federation.owner("stranger", tarfile, invited=False)
    joined = federation.join("stranger")
    assert joined.wait() == 1
    (line,) = [line for line in joined.output().splitlines() if line]
    assert line.startswith("Error: the coordinator does not know this key; send it ")


def test_a_second_process_with_a_key_exits_and_the_first_continues(federation: Federation) -> None:
    federation.owner("twin", inspect)
    first = federation.join("twin", once=False)
    wait_until(lambda: "joined as 'twin'" in first.output(), why=first.output)
    shutil.copytree(federation.state("twin"), federation.state("copy"))
    second = federation.join("copy")
    assert second.wait() == 1
    assert second.output().splitlines()[-1] == (
        "Error: another process with this key has joined; run `join` in one place only"
    )
    same = federation.join("twin")  # and in the same state folder, at once
    assert same.wait() == 1
    assert "another process is working on the owner's state" in same.output()
    assert first.process.poll() is None
    first.stop()


def test_the_authoritys_certificate_alone_gives_no_access_to_control_or_runtime(
    federation: Federation, tmp_path: Path
) -> None:
    context = ssl.create_default_context(cafile=str(federation.ca))
    for path in (
        "control/list-runs",
        "control/start-run",
        "control/list-nodes",
        "runtime/get-nodes",
        "runtime/acquire-task",
    ):
        url = f"https://127.0.0.1:{federation.port}/v1/{path}"
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(urllib.request.Request(url, b"", method="POST"), context=context, timeout=20)
        raised.value.close()
        assert raised.value.code == 404, path
    outside = environment(tmp_path / "home")
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{federation.port}"\n'
        f'root-certificates = "{federation.ca}"\n'
    )
    command = [flower_command("flwr"), "supernode", "list", "here", "--format", "json"]
    done = subprocess.run(command, env=outside, capture_output=True, text=True, check=False, timeout=60)
    assert '"success": true' not in done.stdout
    assert done.returncode != 0 or '"success": false' in done.stdout
    inside = {**outside, "FLWR_HOME": str(federation.coordinator.files.root / "network" / "flower")}
    known = subprocess.run(command, env=inside, capture_output=True, text=True, check=False, timeout=60)
    assert known.returncode == 0  # the same question from within is answered: the test asks the right thing
    assert '"success": true' in known.stdout


ALTERED_SERVER = """
import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    nodes = [node.node_id for node in grid.get_nodes() if node.name == "guarded"]
    content = RecordDict({"expertctl": ConfigRecord({"request": "{}"})})
    waiting = list(grid.push_messages([Message(content, node, "train.expert") for node in nodes]))
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting = []
            reason = str(reply.error.reason) if reply.has_error() else "IT RAN"
            open(context.run_config["workspace"], "w").write(reason)
        time.sleep(1)
"""
ALTERED_CLIENT = """
import pathlib
pathlib.Path({marker!r}).write_text("this coordinator's code ran beside the text")
from expertctl.plugins.flower.owner.taking_in import app
__all__ = ["app"]
"""


def test_an_altered_app_bundle_is_refused_before_its_code_runs(federation: Federation, tmp_path: Path) -> None:
    federation.owner("guarded", optparse)
    joined = federation.join("guarded", once=False)
    state = federation.state("guarded")
    log = state / "flower" / "supernode.log"
    wait_until(lambda: log.is_file() and "SuperNode ID:" in log.read_text(errors="replace"), why=joined.output)
    bundle, verdict, marker = tmp_path / "app", tmp_path / "verdict", tmp_path / "ran"
    shutil.copytree(APP, bundle)
    (bundle / "expertctl_server.py").write_text(ALTERED_SERVER)
    (bundle / "expertctl_client.py").write_text(ALTERED_CLIENT.format(marker=str(marker)))
    home = environment(federation.coordinator.files.root / "network" / "flower")
    command = [flower_command("flwr"), "run", str(bundle), "here", "--run-config", f'workspace="{verdict}"']
    done = subprocess.run(
        [*command, "--format", "json"], env=home, capture_output=True, text=True, check=False, timeout=90
    )
    assert '"success": true' in done.stdout, done.stdout
    wait_until(lambda: verdict.is_file() and verdict.read_text(), why=lambda: log.read_text(errors="replace")[-3000:])
    assert verdict.read_text() == "APP_NOT_ALLOWED"
    assert not marker.exists()
    assert joined.process.poll() is None
    request = federation.ask("guarded", FLEXOLMO)  # and the right app goes on
    wait_until(lambda: federation.accepted().get("guarded") == "guarded", why=joined.output)
    wait_until(lambda: Owner(state).outcome(request) == "accepted", why=joined.output)  # it hears of it a moment later
    joined.stop()
