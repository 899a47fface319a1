"""Seeds made from scratch: sizes, families, and what is said before they train."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from inline_launching import inline_launching
from reporters import Recorder
from transformers import AutoModelForCausalLM

from expertctl import UserError, Workspace
from expertctl.core.config.settings import SeedConfig, TrainingConfig
from expertctl.core.models.loading import load_model
from expertctl.experts.runs.presets import FAMILIES, PRESETS, model_config, preset
from expertctl.experts.scaling.pretraining import pretraining_cost
from expertctl.experts.scaling.shape import shape_of

MILLIONS = {"tiny": 1.3, "small": 6.9, "base": 34, "medium": 135, "large": 372}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_those_that_are_said(name: str, family: str) -> None:
    size = PRESETS[name]
    untied, tied = (
        shape_of(model_config(size, family, 0, size.vocab_size, tied=is_tied)).parameters for is_tied in (False, True)
    )
    assert untied / 1e6 == pytest.approx(MILLIONS[name], rel=0.05)
    assert untied - tied == size.vocab_size * size.hidden_size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_becomes_a_seed(family: str, tied: bool, project: Workspace) -> None:
    notes = Recorder()
    path = project.layout.config_file
    settings = {"preset": "tiny", "family": family, "tied": tied, "training": {"tokens": 256}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": settings}))
    with inline_launching():
        manifest = Workspace(project.root).seed(scratch=True, force=True, reporter=notes)
    model, _ = load_model(project.layout.seed)
    assert model.config.model_type == family
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tied
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert any(f"seed: {parameters:,} parameters" in line for line in notes.lines)
    assert manifest.run is not None
    assert (manifest.run.family, manifest.run.tied) == (family, tied)


def test_attention_biases_read_longer_texts_than_they_were_made_for() -> None:
    config = model_config(preset("tiny"), "bloom", 0, 300)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        assert model(torch.arange(300)[None].repeat(1, 5)).logits.shape == (1, 1500, 300)


def test_the_cost_is_counted_from_the_matrices() -> None:
    config = model_config(preset("tiny"), "llama", 0, 2048)
    training = TrainingConfig(tokens=8 * 256 * 3, sequence_length=256, batch_size=8)
    cost = pretraining_cost(config, training)
    matrices = 4 * (4 * 128 * 128 + 3 * 128 * 352) + 2048 * 128
    assert cost.parameters == matrices + 2048 * 128 + (2 * 4 + 1) * 128
    assert cost.tokens == 8 * 256 * 3
    assert cost.operations == cost.tokens * (6 * matrices + 12 * 4 * 128 * 256)
    assert cost.state_bytes == 16 * cost.parameters


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="base"):
        preset("basic")
    with pytest.raises(UserError, match="qwen3"):
        model_config(preset("tiny"), "qwen", 0, 300)
    wrong: Any = {"family": "gpt5"}
    with pytest.raises(ValueError, match="family"):
        SeedConfig(**wrong)
