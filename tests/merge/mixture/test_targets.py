"""Which class a mixture can be written as, the rule that another breaks, and configurations that are copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expertctl import UserError
from expertctl.core.hooks.mixtures import Architecture, MixtureShape
from expertctl.core.models.architectures import architecture_of
from expertctl.core.testing import tiny_model_folder
from expertctl.merge.mixture.targets import MIXTRAL, QWEN3_MOE, choose_target, feed_forward_module


def dense(tmp_path: Path, family: str, **changes: Any) -> dict[str, Any]:
    folder = tiny_model_folder(tmp_path / family, family)
    return {**json.loads((folder / "config.json").read_text()), **changes}


def choose(config: dict[str, Any], shape: MixtureShape, wanted: str = "auto") -> str:
    family = architecture_of(config["model_type"])
    return choose_target(family, config, shape, wanted).name


@pytest.mark.parametrize(
    ("family", "changes", "shape", "rule"),
    [
        ("llama", {"attention_bias": True}, MixtureShape(2, 1), "its attention has no biases"),
        ("llama", {"mlp_bias": True}, MixtureShape(2, 1), "its experts have no biases"),
        ("llama", {}, MixtureShape(4, 2, normalized=False), "its gates always sum to 1"),
        ("llama", {}, MixtureShape(4, 2, router_bias=True), "its router has no biases"),
        ("olmo2", {}, MixtureShape(4, 2, router_bias=True), "its router has no biases"),
        (
            "qwen3",
            {"use_sliding_window": True},
            MixtureShape(2, 1),
            "its sliding window covers all layers or none",
        ),
        ("olmo", {}, MixtureShape(2, 1), "it has RMS norms with weights"),
    ],
)
def test_a_rule_that_is_broken_is_named_with_what_fits(
    tmp_path: Path, family: str, changes: dict[str, Any], shape: MixtureShape, rule: str
) -> None:
    config = dense(tmp_path, family, **changes)
    assert choose(config, shape) == "container"
    native = architecture_of(family).mixtures[0].name
    with pytest.raises(UserError, match=rf"written as '{native}'.*{rule}.*supported: 'container'"):
        choose(config, shape, native)


def test_a_class_of_another_family_is_refused_with_those_that_fit(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="'olmo2' models cannot be written as 'mixtral'; supported: 'flex_olmo', 'container'"
    ):
        choose(dense(tmp_path, "olmo2"), MixtureShape(2, 1), "mixtral")


def test_the_dense_models_settings_override_class_defaults(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    config = dense(tmp_path, "llama", rms_norm_eps=3e-4, rope_parameters=rope, sliding_window=7)
    mixture = MIXTRAL.config(config, MixtureShape(5, 3))
    assert mixture["rms_norm_eps"] == 3e-4
    assert mixture["rope_parameters"] == rope
    assert mixture["sliding_window"] is None, "Llama has none, whatever its file says"
    assert (mixture["num_local_experts"], mixture["num_experts_per_tok"]) == (5, 3)
    assert mixture["tie_word_embeddings"] == config["tie_word_embeddings"]
    mistral = dense(tmp_path, "mistral", sliding_window=7)
    assert MIXTRAL.config(mistral, MixtureShape(5, 3))["sliding_window"] == 7


def test_gates_sum_to_one_unless_asked_otherwise(tmp_path: Path) -> None:
    config = dense(tmp_path, "qwen3")
    assert QWEN3_MOE.config(config, MixtureShape(4, 2))["norm_topk_prob"] is True
    assert QWEN3_MOE.config(config, MixtureShape(4, 2, normalized=False))["norm_topk_prob"] is False
    assert QWEN3_MOE.config(config, MixtureShape(4, 2))["mlp_only_layers"] == []


def test_a_family_whose_feed_forward_is_no_one_module_is_refused() -> None:
    family = Architecture("odd", ("odd",), ("model.layers.*.fc1.*", "model.layers.*.fc2.*"), (), (), ())
    with pytest.raises(UserError, match="is not a single module per layer"):
        feed_forward_module(family)
    assert feed_forward_module(architecture_of("gpt2")) == "mlp"
