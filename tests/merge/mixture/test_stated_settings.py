"""What a dense configuration leaves out is what its own class makes of it, in a mixture too."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from transformers import AutoConfig

from expertctl.core.errors import UserError
from expertctl.core.hooks.mixtures import MixtureShape
from expertctl.core.models.architectures import architecture_of
from expertctl.merge.mixture.stated_settings import fill_config_defaults
from expertctl.merge.mixture.targets import choose_target

FAMILIES = ("llama", "mistral", "olmo2", "qwen2", "qwen3")
SHAPE = MixtureShape(num_experts=4, top_k=2)
IGNORED = ("transformers_version", "architectures", "model_type")


def whole(family: str) -> dict[str, Any]:
    """Return a configuration in which every key says what its class would fill in."""
    settings: dict[str, Any] = AutoConfig.for_model(family).to_diff_dict()
    return settings


def as_mixture(dense: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of the mixture as its class in transformers reads them."""
    family = architecture_of(dense["model_type"])
    stated = fill_config_defaults(dense)
    settings = dict(choose_target(family, stated, SHAPE).config(stated, SHAPE))
    filled = AutoConfig.for_model(settings.pop("model_type"), **settings).to_dict()
    return {key: value for key, value in filled.items() if key not in IGNORED}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_left_out_is_the_dense_class_s_default(family: str) -> None:
    dense = whole(family)
    expected = as_mixture(dense)
    keys = [key for key in dense if key not in IGNORED]
    assert len(keys) > 12, "there is something to leave out"
    # a head's width is made of two others where it is not given, by both classes
    left_out = {key: as_mixture({name: value for name, value in dense.items() if name != key}) for key in keys}
    for settings in (expected, *left_out.values()):
        if settings.get("head_dim") is None:
            settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    assert {key: actual for key, actual in left_out.items() if actual != expected} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_filled_in_without_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = whole(family)
    left_out = ("max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "rope_parameters")
    short = {key: value for key, value in dense.items() if key not in left_out}
    read = AutoConfig.for_model(**short).to_dict()
    monkeypatch.setitem(sys.modules, "transformers", None)
    stated = fill_config_defaults(short)
    for key in left_out:
        assert stated[key] == read[key], key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_configuration_is_taken_as_it_is(family: str) -> None:
    dense = whole(family)
    assert fill_config_defaults(dense) is dense


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, None])
def test_half_a_rope_is_completed(rope: dict[str, Any] | None) -> None:
    filled = fill_config_defaults(whole("llama") | {"rope_parameters": rope})
    assert filled["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_rope_as_older_files_have_it_is_kept() -> None:
    dense = whole("llama") | {"rope_theta": 5e5, "rope_scaling": None}
    del dense["rope_parameters"]
    assert as_mixture(dense)["rope_parameters"]["rope_theta"] == 5e5


def test_layers_that_a_sliding_window_covers_are_said() -> None:
    dense = whole("qwen2") | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    del dense["layer_types"]
    wanted = AutoConfig.for_model("qwen2", **{k: v for k, v in dense.items() if k != "model_type"}).layer_types
    assert len(set(wanted)) == 2
    assert as_mixture(dense)["layer_types"] == wanted


def test_a_configuration_that_its_class_refuses_is_told() -> None:
    with pytest.raises(UserError, match=r"transformers rejects config\.json of the seed as 'llama'"):
        fill_config_defaults({"model_type": "llama", "hidden_size": "wide"})


def test_a_whole_configuration_needs_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = whole("mistral")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert fill_config_defaults(dense) is dense
