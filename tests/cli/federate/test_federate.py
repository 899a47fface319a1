"""Offline federation with `expertctl federate`: from keys to a merged model, with kills and refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federation_members import MODULES, private_text

from expertctl import Workspace, load_model, verify

COMMAND = [sys.executable, "-m", "expertctl.cli.main"]
TRAINING = ("--tokens", "640", "--set", "sequence_length=16", "--set", "batch_size=2")


@pytest.fixture
def hub(tmp_path: Path, new_workspace: Any) -> Path:
    """Return a coordinator's workspace with public text, and owners' text beside it."""
    folder: Path = new_workspace(tmp_path / "hub", experts=())
    private_text(tmp_path / "public.jsonl", json)
    (folder / "expertctl.yaml").write_text(
        "domains: {public: {path: ../public.jsonl}}\ntraining: {sequence_length: 16}\n"
    )
    for name, module in MODULES.items():
        private_text(tmp_path / f"{name}.jsonl", module)
    return folder


def invite(run: Any, hub: Path, name: str) -> Path:
    """Make an owner's key and invite it; return its state folder."""
    state = hub.parent / f"state-{name}"
    made = run("--json", "federate", "keys", "--state", str(state), cwd=hub)
    done = run("federate", "invite", made.json["public"], "--name", name, cwd=hub)
    assert made.json["fingerprint"] in done.out
    return state


def pack(run: Any, hub: Path, name: str, *how: str, suffix: str = ".tar") -> Path:
    target = hub.parent / f"for-{name}{suffix}"
    done = run("federate", "pack", name, *TRAINING, *how, "-o", str(target), cwd=hub)
    assert done.status == 0, done.err
    return target


def work(hub: Path, name: str, *how: str) -> list[str]:
    """Return the arguments of an owner's work."""
    return [
        *("federate", "work", str(hub.parent / f"for-{name}.tar")),
        *("--data", str(hub.parent / f"{name}.jsonl"), "--state", str(hub.parent / f"state-{name}")),
        *("-o", str(hub.parent / f"from-{name}.tar"), *how),
    ]


def test_owners_deliver_experts_by_file_and_they_merge(run: Any, hub: Path) -> None:
    for name in MODULES:
        invite(run, hub, name)
        pack(run, hub, name)
        done = run("--json", *work(hub, name, "--yes"), cwd=hub.parent)
        assert done.status == 0, done.err
        assert done.json["data"]["domains"][name]["documents"] > 0
        delivered = run("federate", "deliver", str(hub.parent / f"from-{name}.tar"), cwd=hub)
        assert delivered.out == f"the expert of '{name}' is accepted: experts/{name}\n"
    told = run("--json", "federate", "status", cwd=hub).json["owners"]
    assert [(status["owner"], status["state"]) for status in told] == [(name, "accepted") for name in sorted(MODULES)]
    merged = run("merge", "campus", "--method", "flexolmo", cwd=hub)
    assert merged.status == 0
    losses = {status["owner"]: status["public_loss"] for status in told}
    for name, loss in losses.items():
        change = 100 * (loss["expert"] / loss["seed"] - 1)
        assert (
            f"{name}: loss on public text {loss['expert']:.3f} ({change:+.1f}%), compared with the seed" in merged.err
        )
        assert f"{loss['expert']:.3f} ({change:+.1f}%)" in run("federate", "status", cwd=hub).out
    workspace = Workspace(hub)
    load_model(workspace.generalists / "campus")
    assert verify(workspace.generalists / "campus") == []
    again = run("federate", "pack", "site-a", *TRAINING, "-o", str(hub.parent / "x"), cwd=hub)
    assert "'site-a' has delivered an expert for this recipe" in again.error


def test_nothing_leaves_without_consent(run: Any, hub: Path) -> None:
    invite(run, hub, "site-a")
    pack(run, hub, "site-a")
    done = run(*work(hub, "site-a"), cwd=hub.parent)
    assert done.status == 1
    assert "nothing is sent without your consent" in done.error
    assert "statement about your text: about" in done.err
    assert not (hub.parent / "from-site-a.tar").exists()
    whole = run(*work(hub, "site-a", "--review", "--yes"), cwd=hub.parent)
    assert "model.layers.0.mlp.up_proj.weight" in whole.err
    assert "router/rows" in whole.err
    with tarfile.open(hub.parent / "from-site-a.tar") as archive:
        members = archive.getmembers()
    assert {member.name for member in members} == {
        "delivery.json",
        "expert.json",
        "model.safetensors",
        "router.safetensors",
        "run.json",
    }
    assert {(member.uid, member.uname, member.mtime) for member in members} == {(0, "", 0)}


def test_a_delivery_altered_in_transit_is_refused(run: Any, hub: Path) -> None:
    invite(run, hub, "site-a")
    pack(run, hub, "site-a")
    assert run(*work(hub, "site-a", "--yes"), cwd=hub.parent).status == 0
    folder = hub.parent / "altered"
    with tarfile.open(hub.parent / "from-site-a.tar") as archive:
        archive.extractall(folder, filter="data")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    done = run("federate", "deliver", str(folder), cwd=hub)
    assert done.status == 1
    assert "does not match its announced digest" in done.error
    content = json.loads((folder / "delivery.json").read_text())
    content["statement"]["owner"] = "site-b"
    (folder / "delivery.json").write_text(json.dumps(content))
    done = run("federate", "deliver", str(folder), cwd=hub)
    assert "the delivery of 'site-a' is refused: the statement is not signed by the owner's key" in done.error
    assert run("federate", "deliver", str(hub.parent / "from-site-a.tar"), cwd=hub).status == 0


def _escape(folder: Path) -> Path:
    with tarfile.open(folder / "bad.tar", "w") as archive:
        link = tarfile.TarInfo("request.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return folder / "bad.tar"


def _garbage(folder: Path) -> Path:
    (folder / "bad.tar").write_bytes(b"no archive" * 100)
    return folder / "bad.tar"


def _empty(folder: Path) -> Path:
    (folder / "bad").mkdir()
    return folder / "bad"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_escape, "which is not a plain file of an archive of at most"),
        (_garbage, "is not a readable archive"),
        (_empty, "is not a pack: it has no request.json"),
        (lambda folder: folder / "nowhere.tar", "does not exist"),
    ],
)
def test_invalid_packs_are_one_line_errors(run: Any, hub: Path, make: Callable[[Path], Path], said: str) -> None:
    state = invite(run, hub, "site-a")
    done = run(
        *("federate", "work", str(make(hub.parent)), "--data", str(hub.parent / "site-a.jsonl")),
        *("--state", str(state), "-o", str(hub.parent / "out.tar"), "--yes"),
        cwd=hub.parent,
    )
    assert done.status == 1
    assert said in done.error


def test_missing_things_are_one_line_errors(run: Any, hub: Path) -> None:
    state = hub.parent / "state"
    assert "no owner is invited" in run("federate", "status", cwd=hub).out
    assert "there is no key in" in run(*work(hub, "site-a"), cwd=hub.parent).error
    assert "does not exist; the owner makes it" in run("federate", "invite", "none.pub", "--name", "a", cwd=hub).error
    assert "no member 'site-z'" in run("federate", "pack", "site-z", "-o", str(state), cwd=hub).error
    invite(run, hub, "site-a")
    for how, said in {
        ("--deadline", "soon"): "'soon' is not a duration",
        ("--recipe", "flexlomo"): "did you mean 'flexolmo'?",
        ("--set", "sequence_lenght=3"): "sequence_lenght",
        ("--option", "embeding=none"): "has no option 'embeding'",
    }.items():
        done = run("federate", "pack", "site-a", *how, "-o", str(state), cwd=hub)
        assert done.status == 1
        assert said in done.error
    assert not state.exists()


@pytest.mark.long
@pytest.mark.slow
def test_killed_work_resumes_to_the_same_bytes(run: Any, hub: Path) -> None:
    invite(run, hub, "site-a")
    long = ("--tokens", "12800", "--set", "checkpoint_seconds=0.2")
    pack(run, hub, "site-a", *long)
    copy = hub.parent / "undisturbed"
    shutil.copytree(hub.parent / "state-site-a", copy)
    undisturbed = [*work(hub, "site-a", "--yes")]
    undisturbed[undisturbed.index("--state") + 1] = str(copy)
    undisturbed[undisturbed.index("-o") + 1] = str(hub.parent / "undisturbed.tar")
    assert run(*undisturbed, cwd=hub.parent).status == 0
    kills = 0
    for _ in range(20):
        process = subprocess.Popen(
            [*COMMAND, *work(hub, "site-a", "--yes")],
            cwd=hub.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        runs = hub.parent / "state-site-a" / "runs"
        before = set(runs.glob("*/experts/*/.training/step-*"))
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if set(runs.glob("*/experts/*/.training/step-*")) - before:
                break  # a new checkpoint: kill it in what comes after
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == 3:
            break
    assert kills >= 1
    assert run(*work(hub, "site-a", "--yes"), cwd=hub.parent).status == 0

    def experts(path: Path) -> dict[str, bytes]:
        with tarfile.open(path) as archive:
            files = {member.name: archive.extractfile(member) for member in archive}
            return {name: file.read() for name, file in files.items() if file and name != "delivery.json"}

    assert experts(hub.parent / "from-site-a.tar") == experts(hub.parent / "undisturbed.tar")
    assert run("federate", "deliver", str(hub.parent / "from-site-a.tar"), cwd=hub).status == 0


def test_a_withdrawn_request_takes_no_delivery_and_a_declined_one_is_not_trained(run: Any, hub: Path) -> None:
    invite(run, hub, "site-a")
    pack(run, hub, "site-a")
    done = run(*work(hub, "site-a", "--yes"), cwd=hub.parent)
    assert "flexolmo, " in done.err
    assert " until " in done.err
    withdrawn = run("--json", "federate", "stop", "site-a", cwd=hub).json["withdrawn"]
    assert [request["owner"] for request in withdrawn] == ["site-a"]
    done = run("federate", "deliver", str(hub.parent / "from-site-a.tar"), cwd=hub)
    assert done.status == 1
    assert "is refused: the coordinator has withdrawn the request" in done.error
    assert "'site-a' has no open request" in run("federate", "stop", "site-a", cwd=hub).error
    state = hub.parent / "state-site-a"
    identifier = withdrawn[0]["request"]
    declined = run("--json", "federate", "decline", identifier, "--state", str(state), cwd=hub.parent)
    assert declined.json == {"declined": identifier}
    assert "there is no request 'x'" in run("federate", "decline", "x", "--state", str(state)).error


def test_the_ledger_is_audited(run: Any, hub: Path) -> None:
    assert "there is no signed ledger" in run("federate", "audit", cwd=hub).error
    invite(run, hub, "site-a")
    run("federate", "remove", "site-a", cwd=hub)
    audit = run("--json", "federate", "audit", cwd=hub).json
    assert [(entry["state"], entry["owner"]) for entry in audit["entries"]] == [
        ("invited", "site-a"),
        ("removed", "site-a"),
    ]
    assert run("--json", "federate", "status", cwd=hub).json["removed"][0]["owner"] == "site-a"
    assert run("federate", "audit", "--known", audit["digest"], cwd=hub).status == 0
    ledger = hub / "federation" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace("site-a", "site-b", 1))
    tampered = run("federate", "audit", cwd=hub)
    assert tampered.status == 1
    assert "line 1 is not signed by this coordinator, or was changed" in tampered.out


def test_a_key_is_rotated_by_file(run: Any, hub: Path) -> None:
    state = invite(run, hub, "site-a")
    target = hub.parent / "rotation.json"
    made = run("--json", "federate", "rotate-key", "--state", str(state), "-o", str(target), cwd=hub.parent)
    assert made.status == 0, made.err
    accepted = run("--json", "federate", "accept-key", str(target), cwd=hub).json
    assert accepted == {"name": "site-a", "fingerprint": made.json["fingerprint"]}
    assert "may have been rotated already" in run("federate", "accept-key", str(target), cwd=hub).error
    assert run("federate", "rotate-key", "--state", str(state), cwd=hub.parent).status == 2
