"""Mixture commands: merging, plans, tuning, expert changes, absence checks, routing reports, gates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from flexolmo_workspaces import OWNERS

from expertctl.core.hooks.evaluation import Metric, Score
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.verification import verify
from expertctl.experts.measures.evaluation import EvaluatedText, EvaluationTable
from expertctl.workspace import Workspace, comparison


@pytest.fixture
def campus(flexolmo_workspace: Workspace, run: Any) -> Path:
    """The root of a workspace with the mixture `campus` of all owners."""
    root = flexolmo_workspace.root
    if not (root / "generalists" / "campus").exists():
        assert run("merge", "campus", "--method", "flexolmo", "--experts", ",".join(OWNERS), cwd=root).status == 0
    return root


def test_a_mixture_is_planned_and_merged(campus: Path, run: Any) -> None:
    plan = run("--json", "merge", "other", "--method", "flexolmo", "--plan", cwd=campus).json
    actions = {tensor["action"] for tensor in plan["tensors"].values()}
    assert actions == {"copy", "computed"}
    assert plan["bytes_to_write"] > 0
    manifest = read_manifest(campus / "generalists" / "campus")
    assert manifest.merged.kind == "moe"
    assert list(manifest.merged.experts) == ["public", *OWNERS]
    assert verify(campus / "generalists" / "campus") == []
    assert run("reproduce", "campus", cwd=campus).out.strip() == "campus: byte-identical"


def test_an_ensemble_is_planned_without_tensors(campus: Path, run: Any) -> None:
    plan = run("--json", "merge", "forest", "--method", "ensemble", "--plan", cwd=campus).json
    assert plan["tensors"] == {}
    assert "linked instead of copied" in plan["notes"][0]
    assert run("merge", "forest", "--method", "ensemble", "--option", "top_q=1", "--plan", cwd=campus).status == 1


def test_experts_leave_and_join_and_are_proved_absent(campus: Path, run: Any) -> None:
    done = run("--json", "expert", "remove", "chance", "-m", "campus", "-o", "quiet", "--force", cwd=campus)
    assert done.json["experts"] == ["public", "prose", "means"]
    absent = run("verify", "quiet", "--absent", "chance", cwd=campus)
    assert absent.status == 0
    assert "contains none of the" in absent.out
    present = run("verify", "campus", "--absent", "chance", cwd=campus)
    assert (present.status, present.error) == (1, "'chance' is in campus")
    joined = run("--json", "expert", "add", "chance", "-m", "quiet", "-o", "loud", "--force", cwd=campus)
    assert joined.json["experts"][-1] == "chance"
    assert run("expert", "remove", "chnace", "-m", "campus", "-o", "x", cwd=campus).error.startswith(
        "no expert 'chnace' (did you mean 'chance'?)"
    )
    assert run("expert", "add", "chance", "-m", "campus", "-o", "x", cwd=campus).status == 1
    assert not (campus / "generalists" / "x").exists()
    renewed = run("expert", "replace", "prose", "-m", "campus", "-o", "x", "--by", "means", cwd=campus)
    assert renewed.status == 0
    assert run("verify", "x", "--absent", "prose", cwd=campus).status == 0
    for name in ("quiet", "loud", "x"):
        shutil.rmtree(campus / "generalists" / name)


def test_experts_are_switched_off_for_one_text(campus: Path, run: Any) -> None:
    words = ("generate", "campus", "def ", "--max-new-tokens", "4", "--temperature", "0")
    assert run(*words, "--without", "prose,means", cwd=campus).status == 0
    assert "no expert 'news'" in run(*words, "--without", "news", cwd=campus).error
    apart = run(*words, "--without", "prose", "--without", "news", cwd=campus)
    assert "no expert 'news'" in apart.error
    apart = run(*words, "--without", "news", "--without", "prose", cwd=campus)
    assert "no expert 'news'" in apart.error
    assert "has no experts to disable" in run("generate", "seed", "def ", "--without", "prose", cwd=campus).error


def test_routing_is_shown_by_domain_and_expert(campus: Path, run: Any) -> None:
    report = run("--json", "show", "--routing", "campus", "--domains", "prose,public", cwd=campus).json
    assert report["experts"] == ["public", *OWNERS]
    for domain in report["domains"].values():
        assert sum(domain["load"].values()) == pytest.approx(1, abs=1e-4)
        assert len(domain["load_by_layer"]) == 2
    shown = run("show", "--routing", "campus", "--domains", "prose", cwd=campus)
    assert "entropy" in shown.out
    assert "is not a mixture of experts" in run("show", "--routing", "seed", cwd=campus).error
    assert run("show", "campus", "--domains", "prose", cwd=campus).status == 2


def test_a_gate_says_how_a_mixture_compares_and_writes_it_down(campus: Path, run: Any) -> None:
    result = run("--json", "eval", "campus", "--against", "seed,best-expert,average,ensemble", cwd=campus)
    assert result.json["models"].keys() == {"campus", "seed", "best-expert", "average", "ensemble"}
    scores = {
        name: sum(model["bits_per_byte"].values()) / len(result.json["domains"])
        for name, model in result.json["models"].items()
    }
    own = scores.pop("campus")
    assert result.json["holds"] == (own <= min(scores.values()))
    assert result.status == (0 if result.json["holds"] else 3)
    assert result.json["best_baseline"] == min(scores, key=lambda name: scores[name])
    gated = run("--json", "merge", "gated", "--method", "flexolmo", "--gate", cwd=campus)
    assert gated.json["name"] == "gated"
    assert gated.json["folder"] == str((campus / "generalists" / "gated").resolve())
    assert gated.json["evaluation"]["holds"] == (gated.status == 0)
    card = (campus / "generalists" / "gated" / "README.md").read_text()
    assert gated.status == result.status
    assert ("is worse than the best of its baselines" in card) == (gated.status == 3)
    assert verify(campus / "generalists" / "gated") == []
    assert run("reproduce", "gated", cwd=campus).status == 0
    assert not list(campus.glob(".baselines-*"))


def test_a_model_that_is_called_like_a_baseline_is_compared_with_it(campus: Path, run: Any) -> None:
    usual = run("--json", "eval", "campus", "--against", "average,best-expert", cwd=campus).json["models"]
    assert run("merge", "average", "--method", "flexolmo", "--experts", ",".join(OWNERS), cwd=campus).status == 0
    report = run("--json", "eval", "average", "--against", "average,best-expert", cwd=campus).json
    shutil.rmtree(campus / "generalists" / "average")
    assert usual["campus"]["bits_per_byte"] != usual["average"]["bits_per_byte"]
    for row, same in (("average", "campus"), ("average of its experts", "average"), ("best-expert",) * 2):
        assert report["models"][row] == usual[same]
    assert len(report["models"]) == 3


def test_an_expert_that_is_called_like_a_baseline_has_scores_of_its_own(
    campus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []

    def evaluated(layout: Any, project: Any, models: dict[str, Path], *args: Any, **kwargs: Any) -> EvaluationTable:
        scored.extend(models)
        values = {name: float(number) for number, name in enumerate(reversed(list(models)))}
        return EvaluationTable(
            ("prose",),
            {name: {"prose": Score({"bits_per_byte": values[name]}, 1)} for name in models},
            (Metric("bits_per_byte", "bits per byte"),),
            {name: {"prose": EvaluatedText("test", 256, 128, 1.0)} for name in models},
        )

    experts = {"ensemble": campus / "experts" / "prose", "means": campus / "experts" / "means"}
    monkeypatch.setattr(comparison, "_experts_of", lambda *args: experts)
    monkeypatch.setattr(comparison, "_merged", lambda *args: campus / "seed")
    monkeypatch.setattr(comparison, "evaluate", evaluated)
    compared = Workspace(campus).compare("campus", ("best-expert", "ensemble"))
    assert len(set(scored)) == 4, "the model, two experts, and an ensemble"
    means = {name: compared.table.mean(name, compared.metric) for name in compared.table.scores}
    assert means == {"campus": 3.0, "best-expert": 1.0, "ensemble": 0.0}


def test_one_model_is_compared_at_a_time(campus: Path, run: Any) -> None:
    assert run("eval", "campus", "seed", "--against", "seed", cwd=campus).status == 2
    assert "no model 'sead' (did you mean 'seed'?)" in run("eval", "campus", "--against", "sead", cwd=campus).error
    assert "has no experts" in run("eval", "seed", "--against", "average", cwd=campus).error
    assert run("eval", "prose", "--against", "seed", "--domains", "prose", cwd=campus).status in (0, 3)


@pytest.mark.slow
def test_a_mixture_is_tuned_in_a_process_of_its_own(campus: Path, run: Any) -> None:
    words = ("--from", "campus", "--trains", "router", "--domains", "public", "--tokens", "256")
    done = run("--json", "tune", "tuned-here", *words, cwd=campus)
    assert done.status == 0, done.err
    manifest = read_manifest(campus / "generalists" / "tuned-here")
    assert manifest.tunings[0].trains == "router"
    again = run("tune", "tuned-here", *words, cwd=campus)
    assert "exists" in again.error
    assert "cannot be reproduced from its manifest alone" in run("reproduce", "tuned-here", cwd=campus).error


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("tune", "y"), "there is no unfinished tuning 'y'"),
        (("tune", "y", "--from", "campus", "--trains", "router"), "no domains to train on; give --domains A,B"),
        (("tune", "y", "--from", "campus", "--trains", "ruoter", "--domains", "public"), "no trainer 'ruoter'"),
        (("tune", "y", "--from", "absent", "--trains", "router", "--domains", "public"), "no model 'absent'"),
        (("branch", "y", "--domain", "prose", "--trains", "router"), "use it with `expertctl tune NAME --trains router`"),
        (("merge", "y", "--method", "mixture", "--option", "router=embeding"), "no router start 'embeding'"),
        (("merge", "y", "--method", "flexolmo", "--experts", "prose,means,chance", "--option", "top_k=9"), "top_k is 9; with 4 experts it must be in the range 1 to 4"),
        (("merge", "y", "--method", "flexolmo", "--option", "target=mixtral"), "supported: 'flex_olmo', 'container'"),
    ],
)  # fmt: skip
def test_impossible_changes_of_a_mixture_are_refused_in_one_line(
    campus: Path, run: Any, words: tuple[str, ...], part: str
) -> None:
    result = run(*words, cwd=campus)
    assert result.status == 1
    assert part in result.error
    assert not (campus / "generalists" / "y").exists()


def test_experts_with_attention_of_their_own_are_refused_by_name(new_workspace: Any, tmp_path: Path, run: Any) -> None:
    root = new_workspace(tmp_path / "w", ("a", "b"))
    options = ("--option", "router=random")
    refused = run("merge", "m", "--method", "mixture", *options, cwd=root)
    assert refused.error.startswith("expert 'a' has its own 'lm_head.weight' and ")
    assert "--method btx" in refused.error
    insisted = run("merge", "m", "--method", "mixture", *options, "--option", "discard=true", cwd=root)
    assert insisted.status == 0
    assert "tensors of 'a' outside the feed-forward networks are dropped" in insisted.err
    assert run("merge", "n", "--method", "btx", cwd=root).status == 0
    config = json.loads((root / "generalists" / "n" / "config.json").read_text())
    assert config["architectures"] == ["FlexOlmoForCausalLM"]


@pytest.mark.slow
def test_stitches_are_trained_again_when_an_expert_leaves(campus: Path, run: Any) -> None:
    assert run("merge", "stitched", "--method", "stitch", cwd=campus).status == 0
    never = run("expert", "remove", "prose", "-m", "stitched", "-o", "less", "--retrain", cwd=campus)
    assert "were never trained" in never.error
    words = ("--trains", "stitches", "--domains", "public,prose,chance", "--tokens", "256")
    assert run("tune", "joined", "--from", "stitched", *words, cwd=campus).status == 0
    done = run("--json", "expert", "remove", "prose", "-m", "joined", "-o", "less", "--retrain", cwd=campus)
    assert done.status == 0, done.err
    assert "prose" not in done.json["experts"]
    manifest = json.loads((campus / "generalists" / "less" / "generalist.json").read_text())
    assert list(manifest["config"]["tunings"][-1]["domains"]) == ["public", "chance"]
    assert (campus / "generalists" / "less-untrained").is_dir()
