"""Branching and training experts in a small real project."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from inline_launching import inline_launching
from reporters import Recorder

from expertctl import UserError, load_model, verify
from expertctl.core.artefacts.safetensors_io import Checkpoint
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.records import record_as_json
from expertctl.core.manifests.run import read_run
from expertctl.core.models.loading import ExpertTensors
from expertctl.experts.runs.baselines import start_dense
from expertctl.workspace import Workspace


@pytest.fixture(scope="module")
def trained(seeded_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    import shutil

    workspace = Workspace(shutil.copytree(seeded_project, tmp_path_factory.mktemp("trained") / "project"))
    workspace.branch("prose", domain="prose")
    workspace.branch("chance", domain="chance", trains="feed_forward")
    with inline_launching():
        result = workspace.train("prose", "chance")
    assert result.finished == ("prose", "chance"), result
    return workspace


def test_an_expert_goes_on_with_the_seeds_schedule(trained: Workspace) -> None:
    training = read_manifest(trained.experts / "prose").run.training
    assert training.schedule_begin == 0.5
    first = json.loads((trained.experts / "prose" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["learning_rate"] < training.learning_rate * 0.7


def test_the_expert_holds_only_the_trained_parameters(trained: Workspace) -> None:
    names = set(Checkpoint([trained.experts / "chance" / "model.safetensors"]))
    assert names == {name for name in Checkpoint.of_folder(trained.layout.seed) if ".mlp." in name}
    everything = set(Checkpoint([trained.experts / "prose" / "model.safetensors"]))
    assert everything == set(Checkpoint.of_folder(trained.layout.seed))


def test_an_expert_says_where_it_comes_from(trained: Workspace) -> None:
    manifest = read_manifest(trained.experts / "prose")
    assert [(parent.kind, parent.digest) for parent in manifest.parents] == [
        ("seed", read_manifest(trained.layout.seed).digest)
    ]
    assert manifest.domains["prose"].documents == 18
    assert manifest.data.trained_tokens == 2560
    assert "dull" not in json.dumps(record_as_json(manifest.data))
    assert verify(trained.experts / "prose") == []


def test_training_helps_at_home(trained: Workspace) -> None:
    table = trained.evaluate("seed", "prose", "chance")
    for name in ("prose", "chance"):
        assert table.best(name, table.metrics[0]) == name


def test_training_again_costs_nothing(trained: Workspace) -> None:
    before = (trained.experts / "prose" / "expert.json").stat().st_mtime_ns
    assert trained.train("prose").finished == ("prose",)
    assert (trained.experts / "prose" / "expert.json").stat().st_mtime_ns == before


def test_the_same_branch_gives_the_same_bytes(trained: Workspace, project: Workspace) -> None:
    project.branch("prose", domain="prose")
    assert not project.train("prose").failed
    for name in ("model.safetensors", "expert.json"):
        assert (project.experts / "prose" / name).read_bytes() == (trained.experts / "prose" / name).read_bytes()


def test_a_branch_may_start_from_an_average_of_experts(trained: Workspace) -> None:
    trained.branch("mixed", domain="prose", start={"prose": 3, "chance": 1}, trains="*.mlp.down_proj.*", force=True)
    with inline_launching():
        assert not trained.train("mixed").failed
    seed = Checkpoint.of_folder(trained.layout.seed)
    prose, chance, mixed = (ExpertTensors(seed, trained.experts / name) for name in ("prose", "chance", "mixed"))
    frozen = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(mixed.read(frozen), 0.75 * prose.read(frozen) + 0.25 * chance.read(frozen))
    assert [parent.name for parent in read_manifest(trained.experts / "mixed").parents] == [
        "seed",
        "prose",
        "chance",
    ]
    assert read_manifest(trained.experts / "mixed").parents[1].weight == 0.75


def test_auto_starts_nearest_to_the_experts_that_predict_the_domain(trained: Workspace) -> None:
    spec = trained.branch("near", domain="prose", start="auto", force=True)
    assert set(spec.start) >= {"prose", "chance"}
    assert sum(spec.start.values()) == pytest.approx(1)
    assert spec.start["prose"] > spec.start["chance"]


def test_auto_without_experts_is_the_seed(project: Workspace) -> None:
    assert project.branch("first", domain="prose", start="auto").start == {"seed": 1.0}


def test_the_loaded_expert_is_what_was_trained(trained: Workspace) -> None:
    model, tokenizer = load_model(trained.experts / "prose")
    own = Checkpoint([trained.experts / "prose" / "model.safetensors"])
    for name, tensor in model.state_dict().items():
        if name in own:
            assert torch.equal(tensor, own.read(name))
    assert tokenizer("def")["input_ids"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domain": "prosa"}, r"no domain 'prosa' \(did you mean 'prose'\?\)"),
        (
            {"domain": "prose", "trains": "feedforward"},
            r"no trainer 'feedforward' \(did you mean 'feed_forward'\?\)",
        ),
        ({"domain": "prose", "start": {"law": 1}}, r"no finished expert 'law'"),
        ({"domain": "prose", "start": {"seed": 0}}, r"initial weights sum to 0"),
        ({"domain": "prose", "options": {"depth": 3}}, r"trainer 'all' has no option 'depth'"),
        ({}, r"give its domain"),
        (
            {"domain": "prose", "training": {"stages": [{"share": 0.5, "sequence_length": 24}]}},
            r"training.stages: blocks of 32 tokens \(sequence_length\) cannot be cut into blocks of 24; choose",
        ),
        (
            {"domain": "prose", "training": {"annealing": {"share": 0.5, "domains": ["chanse"]}}},
            r"no domain 'chanse' \(did you mean 'chance'\?\)",
        ),
        (
            {"domain": "prose", "training": {"annealing": {"share": 0.01, "domains": ["chance"]}}},
            r"training.annealing: the run has 20 steps, and annealing rounds to none; change the share",
        ),
        (
            {"domain": "prose", "training": {"stages": [{"share": 0.5, "length": 16}]}},
            r"'new': unknown key 'length' in training.stages",
        ),
    ],
)
def test_a_branch_that_makes_no_sense_is_refused(project: Workspace, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        project.branch("new", **settings)
    assert not (project.experts / "new").exists()


@pytest.mark.parametrize("name", ["seed", "../x", ".hidden", "a b", ""])
def test_names_that_are_no_folder_names_are_refused(project: Workspace, name: str) -> None:
    with pytest.raises(UserError, match="cannot be called"):
        project.branch(name, domain="prose")


def test_a_pattern_that_matches_nothing_names_what_there_is(project: Workspace) -> None:
    with pytest.raises(UserError, match=r"no tensor matches 'model.layers.\*.mpl.\*'; the model has"):
        project.branch("new", domain="prose", trains="model.layers.*.mpl.*")
    assert not (project.experts / "new").exists()


@pytest.mark.parametrize("trains", ["feed_forward", "flexolmo"])
def test_a_family_whose_feed_forward_is_not_known_is_refused_with_a_pattern(
    new_workspace: object, tmp_path: Path, trains: str
) -> None:
    root: Path = new_workspace(tmp_path / "ws", [])  # type: ignore[operator]
    config = json.loads((root / "seed" / "config.json").read_text()) | {"model_type": "of_a_plugin"}
    seed = read_manifest(root / "seed")
    renamed = {name.replace(".mlp.", ".block."): digest for name, digest in seed.tensors.items()}
    replace(seed, tensors=renamed).write(root / "seed")
    (root / "seed" / "config.json").write_text(json.dumps(config))
    (root / "expertctl.yaml").write_text("domains: {law: {bundled: python}}\ntraining: {sequence_length: 16}\n")
    with pytest.raises(UserError, match=r"those of 'of_a_plugin' are not known.*model.layers.\*."):
        Workspace(root).branch("new", domain="law", trains=trains)


def test_text_shorter_than_a_block_fails_that_expert_and_no_other(project: Workspace) -> None:
    text = project.root / "text" / "chance"
    (text / "train.jsonl").write_text('{"text": "short"}\n')
    for name in ("prose", "chance"):
        project.branch(name, domain=name)
    result = project.train("chance", "prose", jobs=2)
    assert result.finished == ("prose",)
    assert "less than one block of 32" in result.failed["chance"]


def test_a_worker_that_dies_of_a_bug_keeps_its_traceback_in_the_log(project: Workspace) -> None:
    project.branch("prose", domain="prose")
    run = project.experts / "prose" / "run.json"
    content = json.loads(run.read_text())
    run.write_text(json.dumps(content | {"domains": [7]}))
    failed = project.train("prose").failed["prose"]
    assert failed


def test_an_expert_in_training_elsewhere_is_left_alone(project: Workspace) -> None:
    from filelock import FileLock

    project.branch("prose", domain="prose")
    with FileLock(project.layout.lock("run-prose")):
        failed = project.train("prose").failed
    assert "another process is working on expert 'prose'" in failed["prose"]
    with inline_launching():
        assert not project.train("prose").failed


def test_settings_that_changed_since_the_branch_are_reported(project: Workspace) -> None:
    config = yaml.safe_load((project.root / "expertctl.yaml").read_text())
    config["experts"] = {"late": {"domain": "prose"}}
    (project.root / "expertctl.yaml").write_text(yaml.safe_dump(config))
    workspace = Workspace(project.root)
    workspace.branch("late")
    config["experts"]["late"]["training"] = {"batch_size": 3}
    (project.root / "expertctl.yaml").write_text(yaml.safe_dump(config))
    said = Recorder()
    with inline_launching():
        assert Workspace(project.root).train("late", reporter=said).finished == ("late",)
    assert any("'late' keeps the settings" in line and "batch_size" in line for line in said.lines)


def test_a_dense_baseline_is_matched_to_the_experts_that_are_named(trained: Workspace) -> None:
    layout = trained.layout
    run = read_run(start_dense(layout, experts=["prose"]))
    prose = read_run(layout.experts / "prose")
    assert run.domains == ("prose",)
    assert run.training.tokens == prose.training.trained_tokens
    with pytest.raises(UserError, match="was set up for other experts or settings; use --force"):
        start_dense(layout)
    both = read_run(start_dense(layout, force=True))
    assert both.domains == ("chance", "prose")
    assert both.training.tokens > run.training.tokens
    with pytest.raises(UserError, match=r"no finished expert 'prosa' \(did you mean 'prose'\?\)"):
        start_dense(layout, experts=["prosa"])
