"""Shapes of models: counted like a real model, whatever its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from expertctl import UserError
from expertctl.experts.scaling.shape import SIZES, folder_shape, named_shape, shape_of

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "intermediate_size": 48}


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(family: str, tied: bool) -> None:
    config = AutoConfig.for_model(family, **TINY, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    lookups = 0 if tied else model.get_input_embeddings().weight.numel()
    assert shape.multiplied == sum(p.numel() for p in model.parameters() if p.dim() > 1) - lookups
    mlp = [parameter.numel() for name, parameter in model.named_parameters() if ".mlp." in name]
    assert shape.in_feed_forwards == sum(mlp) > 0


def test_common_sizes_have_about_the_parameters_that_they_are_called_by() -> None:
    billions = {name: named_shape(name).parameters / 1e9 for name in SIZES}
    assert billions["7b"] == pytest.approx(6.738, abs=0.001)
    assert billions["70b"] == pytest.approx(70.55, abs=0.01)
    assert billions["1b"] == pytest.approx(1.48, abs=0.01)
    with pytest.raises(UserError, match="no size '9b'"):
        named_shape("9b")


def test_mixtures_and_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    config: Any = AutoConfig.for_model("mixtral", **TINY, num_local_experts=4)
    with pytest.raises(UserError, match="a plan needs a dense model"):
        shape_of(config)
    with pytest.raises(UserError, match=r"has no config\.json, so it is no folder of a model"):
        folder_shape(tmp_path)
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    assert folder_shape(tmp_path).layers == 2
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": -8}')
    with pytest.raises(UserError, match=r"is not a model supported by transformers: .*hidden size \(-8\)"):
        folder_shape(tmp_path)
