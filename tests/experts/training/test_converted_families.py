"""Families that transformers converts at loading are imported, trained and merged under the names of their files."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from inline_launching import inline_launching
from made_experts import write_expert
from safetensors.torch import load_file, save_file
from tiny_families import family_folder
from transformers import AutoModelForCausalLM

from expertctl import UserError
from expertctl.core.artefacts.safetensors_io import write_tensors
from expertctl.core.manifests.finishing import finish_artefact
from expertctl.core.manifests.manifest import Manifest, read_manifest
from expertctl.core.models.loading import load_network
from expertctl.core.models.stored_names import checkpoint_tensors
from expertctl.experts.runs.tuning import TuningSettings
from expertctl.experts.training import run as training_run
from expertctl.workspace import Workspace

FAMILIES = (
    "gpt_neox",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "flex_olmo",
    "deepseek_v2",
    "deepseek_v3",
    "granitemoe",
    "hrm_text",
    "kimi_linear",
    "gpt2",
)
ONE_STEP = {"tokens": 64, "sequence_length": 16, "batch_size": 4, "learning_rate": 0.01}


def imported(root: Path, family: str) -> tuple[Workspace, Path]:
    """Return a workspace with a domain and an imported seed, and the folder that the seed was imported from."""
    lines = Path(textwrap.__file__).read_text(encoding="utf-8").splitlines()
    root.mkdir()
    for part, begin in (("train", 0), ("valid", 200)):
        texts = ["\n".join(lines[line : line + 20]) for line in range(begin, begin + 200, 20)]
        (root / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    project = {"training": ONE_STEP, "domains": {"prose": {"train": "train.jsonl", "valid": "valid.jsonl"}}}
    (root / "expertctl.yaml").write_text(json.dumps(project))
    source = family_folder(root.parent / "source", family)
    workspace = Workspace(root)
    workspace.seed(source)
    return workspace, source


def train(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, torch.Tensor]:
    """Train expert `prose` for a step and return the parameters of the model in memory when it ended."""
    trained: dict[str, torch.Tensor] = {}
    write = training_run.write_artefact

    def keep(run: Any, model: Any, *rest: Any) -> None:
        trained.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        write(run, model, *rest)

    monkeypatch.setattr(training_run, "write_artefact", keep)
    workspace.branch("prose", domain="prose", **settings)
    with inline_launching():
        result = workspace.train("prose")
    assert result.finished == ("prose",), result
    return trained


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def names_in(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_is_averaged_with_the_folder_that_its_seed_was_imported_from(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, source = imported(tmp_path / "ws", family)
    assert names_in(workspace.layout.seed) == names_in(source)
    trained = train(workspace, monkeypatch)

    expert = workspace.experts / "prose"
    assert names_in(expert) <= names_in(source)
    original, restored = parameters(load_network(source)), parameters(load_network(expert))
    assert any(not torch.equal(original[name], trained[name]) for name in original)
    for name, parameter in restored.items():
        assert torch.equal(parameter, trained[name]), name

    workspace.merge("both", method="linear", experts=["prose", str(source)])
    folder = workspace.layout.generalists / "both"
    average = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in average.named_parameters():
        torch.testing.assert_close(parameter.detach(), (trained[name] + original[name]) / 2, atol=1e-7, rtol=1e-6)
    average.save_pretrained(tmp_path / "again")
    assert names_in(folder) == names_in(tmp_path / "again") == names_in(source)


@pytest.mark.slow
def test_only_the_feed_forward_networks_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, _ = imported(tmp_path / "ws", "mixtral")
    train(workspace, monkeypatch, trains="feed_forward")
    names = names_in(workspace.experts / "prose")
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in names
    assert all(".block_sparse_moe." in name for name in names)


@pytest.mark.slow
def test_a_seed_with_names_in_memory_goes_on_working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, source = imported(tmp_path / "ws", "qwen3_moe")
    seed = workspace.layout.seed
    tensors = checkpoint_tensors(load_network(seed))
    manifest = read_manifest(seed)
    for name in ("model.safetensors", "seed.json"):
        (seed / name).unlink()
    write_tensors(seed / "model.safetensors", tensors)
    finish_artefact(seed, Manifest(kind="seed", name="seed", config=manifest.config, licence=manifest.licence))
    trained = train(workspace, monkeypatch)
    assert names_in(workspace.experts / "prose") <= set(tensors)
    restored = parameters(load_network(workspace.experts / "prose"))
    assert all(torch.equal(restored[name], trained[name]) for name in trained)
    workspace.merge("half", method="linear", experts=["prose"])
    average = parameters(load_network(workspace.layout.generalists / "half"))
    assert all(torch.equal(average[name], trained[name]) for name in trained)
    with pytest.raises(UserError, match=r"store the same tensors in different layouts .*import a seed again"):
        workspace.merge("both", method="linear", experts=["prose", str(source)])


def test_a_folder_without_the_prefix_is_imported_and_merged(tmp_path: Path) -> None:
    workspace, source = imported(tmp_path / "ws", "gpt2")
    tensors = load_file(source / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors if name != "lm_head.weight")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, source / "model.safetensors", metadata={"format": "pt"})
    workspace.seed(source, force=True)
    assert names_in(workspace.layout.seed) == set(tensors)
    workspace.merge("copy", method="linear", experts=[str(source)])
    assert names_in(workspace.layout.generalists / "copy") == set(tensors)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("model.layers.*.block_sparse_moe.experts.0.*", r"matches tensor '.*experts\.0\..*', but not '.*experts\.1\."),
        ("model.layers.*.mlp.experts.gate_up_proj", "no tensor matches 'model.layers"),
        (
            "model.norm.weight, model.nrom.weight",
            r"no tensor matches 'model\.nrom\.weight'.*such as 'model\.norm\.weight'",
        ),
    ],
)
def test_patterns_that_training_cannot_follow_are_refused(tmp_path: Path, pattern: str, said: str) -> None:
    workspace, _ = imported(tmp_path / "ws", "mixtral")
    with pytest.raises(UserError, match=said):
        workspace.branch("prose", domain="prose", trains=pattern)
    assert not (workspace.experts / "prose").exists()


def test_a_pattern_matches_names_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, _ = imported(tmp_path / "ws", "mixtral")
    train(workspace, monkeypatch, trains="model.layers.0.block_sparse_moe.experts.*.w2.weight")
    names = names_in(workspace.experts / "prose")
    assert names
    assert all(name.startswith("model.layers.0.block_sparse_moe.experts.") for name in names)
    assert all(name.endswith("w2.weight") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "llama4_text", "lfm2_moe"])
def test_the_routers_of_an_average_are_tuned_where_the_first_layer_has_none(family: str, tmp_path: Path) -> None:
    workspace, _ = imported(tmp_path / "ws", family)
    for number, name in enumerate(("a", "b"), start=1):
        write_expert(workspace.root, name, seed=number)
    workspace.merge("average", method="average")
    with inline_launching():
        workspace.generalists.tune("tuned", "average", TuningSettings(trains="router", domains=("prose",)))
    before, after = (
        load_file(workspace.layout.generalists / name / "model.safetensors") for name in ("average", "tuned")
    )
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(".gate." in name or ".router." in name for name in changed)
    assert any(".0." not in name for name in changed)
