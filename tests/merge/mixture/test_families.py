"""Families whose feed-forward networks can become experts run as a mixture; all others are refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixtures_of_copies import TOKENS, copies, mix

from expertctl import UserError, load_model
from expertctl.core.models.loading import load_network
from expertctl.core.testing import tiny_model_folder
from expertctl.plugins.methods.flexolmo.coordinated import coordinate

pytestmark = pytest.mark.slow

RUNS = ["falcon_h1", "gpt_neox", "lfm2", "phi", "glm4", "stablelm", "olmo"]
REFUSED = {
    "bloom": "takes hidden_states, residual",
    "opt": "not a single module",
    "xglm": "not a single module",
    "biogpt": "not a single module",
    "mpt": "has no hidden_size|takes hidden_states, residual",
    "rwkv": "its blocks read their weights",
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "gpt_oss", "phimoe", "jamba", "deepseek_v2"),
        "mixtures? of experts",
    ),
    "granitemoe": "mixture of experts",
    "llama4_text": "mixtures? of experts",
    "nemotron_h": "mixtures of experts",
}


@pytest.mark.parametrize("family", RUNS)
def test_a_mixture_of_copies_is_the_model(family: str, tmp_path: Path) -> None:
    models = copies(tmp_path, family, 2)
    mixture, _ = load_model(mix(tmp_path, models), dtype="float32")
    with torch.inference_mode():
        expected = load_model(models["base"])[0](input_ids=TOKENS).logits
        torch.testing.assert_close(mixture(input_ids=TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_a_family_that_cannot_be_mixed_is_refused_in_the_plan(family: str, reason: str, tmp_path: Path) -> None:
    models = copies(tmp_path, family, 2)
    with pytest.raises(UserError, match=reason) as caught:
        mix(tmp_path, models)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mixture").exists()


@pytest.mark.parametrize("family", [family for family in REFUSED if family != "nemotron_h"])
def test_flexolmo_refuses_what_it_cannot_train(family: str, tmp_path: Path) -> None:
    model = load_network(tiny_model_folder(tmp_path / "model", family))
    with pytest.raises(UserError, match=r"feed-forward network"):
        coordinate(model, torch.zeros(8, 16), bias="clamp")
