"""Rounds of a shared model with `expertctl federate ask --recipe diloco`, exchanged by files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from federation_members import MODULES, private_text
from inline_launching import ask_inline

from expertctl import Workspace, load_model, verify
from expertctl.experts.federation.judging.judges import Judges

ASK = ("federate", "ask", "--experts", "site-a,site-b", "--name", "campus", "--rounds", "2")
TRAINING = ("--tokens", "640", "--set", "sequence_length=16", "--set", "batch_size=2")


@pytest.fixture
def hub(tmp_path: Path, new_workspace: Any, run: Any) -> Path:
    """Return a coordinator's workspace with public text and two owners."""
    folder: Path = new_workspace(tmp_path / "hub", experts=())
    private_text(tmp_path / "public.jsonl", json)
    (folder / "expertctl.yaml").write_text(
        "domains: {public: {path: ../public.jsonl}}\ntraining: {sequence_length: 16}\n"
    )
    for name, module in MODULES.items():
        private_text(tmp_path / f"{name}.jsonl", module)
        made = run("--json", "federate", "keys", "--state", str(tmp_path / f"state-{name}"), cwd=folder)
        run("federate", "invite", made.json["public"], "--name", name, cwd=folder)
    return folder


def carry(run: Any, hub: Path, name: str) -> Any:
    """Carry the open round to an owner and back; return the result of `deliver`."""
    there, back = hub.parent / f"for-{name}.tar", hub.parent / f"from-{name}.tar"
    packed = run("federate", "pack", name, "--shared", "campus", "-o", str(there), "--force", cwd=hub)
    assert packed.status == 0, packed.err
    done = run(
        *("federate", "work", str(there), "--data", str(hub.parent / f"{name}.jsonl"), "--yes", "--force"),
        *("--state", str(hub.parent / f"state-{name}"), "-o", str(back)),
        cwd=hub.parent,
    )
    assert done.status == 0, done.err
    return run("federate", "deliver", str(back), cwd=hub)


def test_two_rounds_exchanged_by_files_become_a_generalist(
    run: Any, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judges, "_ask", ask_inline)
    asked = run("--json", *ASK, "--recipe", "fedavg", *TRAINING, cwd=hub)
    assert asked.status == 0, asked.err
    assert asked.json["shared"]["missing"] == ["site-a", "site-b"]
    first = carry(run, hub, "site-a")
    assert first.out.splitlines()[0] == "the weights of 'site-a' count in round 1 of 2 of 'campus'"
    assert "1 of 2 owners have delivered" in first.out
    again = run("federate", "pack", "site-a", "--shared", "campus", "-o", str(hub.parent / "x.tar"), cwd=hub)
    assert "'site-a' has no open request for 'campus': it has delivered" in again.error
    assert "round 1 of 2 of 'campus': site-a and site-b averaged" in carry(run, hub, "site-b").out
    told = run("--json", "federate", "status", cwd=hub).json
    assert [(shared["name"], shared["state"], shared["number"]) for shared in told["shared"]] == [
        ("campus", "waiting", 1)
    ]
    assert {owner["detail"] for owner in told["owners"]} == {"round 2 of 2 of 'campus'"}
    carry(run, hub, "site-a")
    assert carry(run, hub, "site-b").out.splitlines()[-1] == "'campus' is finished: generalists/campus"
    assert "campus" in run("federate", "status", cwd=hub).out
    folder = Workspace(hub).generalists / "campus"
    assert verify(folder) == []
    load_model(folder)
    card = run("card", "campus", cwd=hub).out
    assert "`site-a` and `site-b` trained together" in card
    assert run("eval", "seed", "campus", cwd=hub).status == 0
    for command, said in {
        ("expert", "remove", "site-a", "-m", "campus", "-o", "y"): "it has no experts to add or remove",
        ("reproduce", "campus"): "was trained in rounds with weights that only the owners have",
    }.items():
        done = run(*command, cwd=hub)
        assert done.status == 1
        assert said in done.error


def test_invalid_rounds_are_one_line_errors(run: Any, hub: Path) -> None:
    for how, said in {
        (
            "--recipe",
            "diloco",
            "--dp",
            "epsilon=8,delta=1e-6",
        ): "'diloco' does not support differential privacy",
        ("--recipe", "diloco", "--option", "max_chang=1"): "did you mean 'max_change'?",
        ("--recipe", "diloco", "--option", "momentum=1"): "momentum is 1.0; it must be at least 0 and less than 1",
        ("--recipe", "diloco", "--set", "sequence_lenght=3"): "sequence_lenght",
        ("--recipe", "diloco", "--tokens", "40"): "too few for 2 rounds",
        ("--recipe", "btm"): "--rounds, --quorum, --grace, --late and --name apply only to the recipes",
        ("--recipe", "diloco", "--name", "../x"): "cannot be called '../x'",
        ("--recipe", "diloco", "--name", "seed"): "cannot be called 'seed'",
    }.items():
        done = run(*ASK, *how, cwd=hub)
        assert done.status == 1
        assert said in done.error
    for how, said in {
        ("--recipe", "diloco"): "start rounds with `expertctl federate ask --recipe diloco`",
        ("--shared", "nothing"): "no shared model 'nothing'",
    }.items():
        done = run("federate", "pack", "site-a", *how, "-o", str(hub.parent / "x"), cwd=hub)
        assert done.status == 1
        assert said in done.error
    assert not (hub / "federation" / "shared").exists()
