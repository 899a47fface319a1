"""Seeds with another RoPE base and more positions, against transformers' own model with these settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import family_folder
from transformers import AutoConfig, AutoModelForCausalLM

from expertctl import UserError, load_model, verify
from expertctl.core.artefacts.layout import Layout
from expertctl.core.artefacts.positions import Positions
from expertctl.core.manifests.manifest import ImportedSeed, read_manifest
from expertctl.core.models.loading import max_positions, seed_of
from expertctl.core.testing import tiny_model_folder
from expertctl.experts.runs.seed import import_seed
from expertctl.workspace import Workspace

LONGER = Positions(500_000.0, 1024)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "expertctl.yaml").write_text("")
    return Layout(tmp_path / "workspace")


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.arange(1, 101)[None]).logits


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen3", "phi3", "mixtral"])
def test_the_seed_is_transformers_own_model_with_that_base(layout: Layout, tmp_path: Path, family: str) -> None:
    source = family_folder(tmp_path / "model", family)
    before = (source / "config.json").read_bytes()
    manifest = import_seed(layout, source, positions=LONGER)
    assert (source / "config.json").read_bytes() == before  # although other files are linked
    assert isinstance(manifest.config, ImportedSeed)
    assert (manifest.config.rope_base, manifest.config.positions) == (500_000.0, 1024)
    assert read_manifest(layout.seed) == manifest
    assert verify(layout.seed) == []
    assert settings_of(layout.seed)["rope_parameters"]["rope_theta"] == 500_000.0
    assert max_positions(layout.seed) == 1024

    own = AutoConfig.from_pretrained(source)
    assert own.rope_parameters["rope_theta"] == 10_000.0 if family != "mixtral" else 1_000_000.0
    own.rope_parameters = {**own.rope_parameters, "rope_theta": 500_000.0}
    own.max_position_embeddings = 1024
    expected = AutoModelForCausalLM.from_pretrained(source, config=own, dtype=torch.float32)
    found, _ = load_model(layout.seed)
    torch.testing.assert_close(logits(found.float()), logits(expected), atol=1e-4, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert not torch.allclose(logits(plain), logits(expected), atol=1e-3)


def test_a_configuration_in_the_older_notation_is_changed_everywhere(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model", "llama")
    content = settings_of(source)
    del content["rope_parameters"]
    (source / "config.json").write_text(json.dumps({**content, "rope_theta": 10000.0, "rope_scaling": None}))
    import_seed(layout, source, positions=Positions(base=2e5))
    config = settings_of(layout.seed)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 2e5
    assert "rope_scaling" not in config
    assert config["max_position_embeddings"] == content["max_position_embeddings"]
    assert AutoConfig.from_pretrained(layout.seed).rope_parameters["rope_theta"] == 2e5


def test_more_positions_alone_keep_the_base(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model", "llama")
    manifest = import_seed(layout, source, positions=Positions(number=4096))
    expected = {**settings_of(source), "max_position_embeddings": 4096}
    assert settings_of(layout.seed) == expected
    assert manifest.config == ImportedSeed("llama", (), None, 4096)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma3_text"])
def test_a_family_without_one_plain_rope_is_refused(layout: Layout, tmp_path: Path, family: str) -> None:
    with pytest.raises(UserError, match=r"has no RoPE whose base|has several kinds of RoPE"):
        import_seed(layout, family_folder(tmp_path / "model", family), positions=LONGER)
    assert not layout.seed.exists()


SCALED = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_a_scaled_rope_is_refused(layout: Layout, tmp_path: Path, kind: str) -> None:
    source = tiny_model_folder(tmp_path / "model", "llama")
    rope = {"rope_type": kind, "rope_theta": 1e4, **SCALED[kind]}
    (source / "config.json").write_text(json.dumps({**settings_of(source), "rope_parameters": rope}))
    with pytest.raises(UserError, match=rf"scales its RoPE \({kind}\)"):
        import_seed(layout, source, positions=LONGER)
    assert not layout.seed.exists()


def test_fewer_positions_and_impossible_bases_are_refused(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model", "llama")
    own = settings_of(source)["max_position_embeddings"]
    with pytest.raises(UserError, match=rf"has {own} positions; give at least as many, not 16"):
        import_seed(layout, source, positions=Positions(number=16))
    for base in (1.0, -5.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"a RoPE base is a finite number above 1"):
            Positions(base=base)
    with pytest.raises(UserError, match=r"at least one position"):
        Positions(number=0)


def test_the_project_file_and_the_call_may_both_ask_for_it(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model", "llama")
    layout.config_file.write_text(json.dumps({"seed": {"from": str(source), "rope_base": 30000, "positions": 512}}))
    workspace = Workspace(layout.root)
    assert workspace.seed().config == ImportedSeed("llama", (), 30000.0, 512)
    assert workspace.seed(rope_base=4e4, force=True).config == ImportedSeed("llama", (), 4e4, 512)
    with pytest.raises(UserError, match=r"replace those of an imported model"):
        workspace.seed(scratch=True, rope_base=4e4, force=True)
    layout.config_file.write_text(json.dumps({"seed": {"positions": 512}}))
    with pytest.raises(UserError, match=r"replace those of an imported model"):
        Workspace(layout.root).seed(force=True)


def test_an_expert_does_not_take_a_seed_with_the_same_weights_and_another_base(
    project: Workspace, tmp_path: Path
) -> None:
    from inline_launching import inline_launching

    project.branch("prose", domain="prose")
    with inline_launching():
        assert not project.train("prose").failed
    expert = project.experts / "prose"
    manifest = read_manifest(expert)
    assert seed_of(expert, manifest) == project.layout.seed
    source = tmp_path / "own"
    project.layout.seed.rename(source)
    project.seed(source, rope_base=1e6)
    assert read_manifest(project.layout.seed).digest == read_manifest(source).digest
    with pytest.raises(UserError, match=r"from a seed with another config.json, such as another RoPE base"):
        seed_of(expert, manifest)
    with pytest.raises(UserError, match=r"another RoPE base"):
        project.merge("forest", method="average")
