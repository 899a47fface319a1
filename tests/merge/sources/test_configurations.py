"""Settings that change no shape: refused where they change the function, noted where they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expertctl.core.errors import UserError
from expertctl.core.testing.fixtures import tiny_model_folder
from expertctl.merge.merging import MergeRun, plan_recipe
from expertctl.merge.planning.plan import MergePlan
from expertctl.merge.recipes.recipe import Recipe, whole_models


def changed(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """Write the tiny model with other settings in its `config.json`; None removes one."""
    tiny_model_folder(folder, family)
    config = json.loads((folder / "config.json").read_text()) | settings
    stated = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def plan(first: Path, second: Path, **run: Any) -> MergePlan:
    weights = {"a": {"weight": 1.0}, "b": {"weight": 1.0}}
    return plan_recipe(
        Recipe("linear", {"a": first, "b": second}, whole_models(("a", "b"), weights)), None, run=MergeRun(**run)
    )


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("num_attention_heads", 2, 4),
        ("hidden_act", "silu", "gelu"),
        ("rms_norm_eps", 1e-6, 1e-5),
        ("rope_parameters.rope_theta", 10000.0, 500000.0),
        ("attention_bias", False, True),
    ],
)
def test_another_function_of_the_same_weights_is_refused(key: str, ours: Any, theirs: Any, tmp_path: Path) -> None:
    settings = {key: theirs}
    if key.startswith("rope"):
        settings = {"rope_parameters": {"rope_type": "default", "rope_theta": theirs}}
    if key == "num_attention_heads":
        settings |= {"head_dim": 4, "num_key_value_heads": 4}
    folders = changed(tmp_path / "a"), changed(tmp_path / "b", **settings)
    with pytest.raises(UserError) as caught:
        plan(*folders)
    assert f"{key} is {ours!r} in 'a' and {theirs!r} in 'b'" in str(caught.value)
    assert str(folders[1] / "config.json") in str(caught.value)
    notes = plan(*folders, allow_unrelated=True).notes
    assert any(note.startswith(f"{key} is {ours!r} in 'a'") for note in notes)


def test_the_old_and_the_new_way_to_state_a_rotary_base_are_the_same(tmp_path: Path) -> None:
    old = changed(tmp_path / "b", rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    assert "rope_theta" in json.loads((old / "config.json").read_text())
    assert plan(changed(tmp_path / "a"), old).notes == plan(tmp_path / "a", changed(tmp_path / "c")).notes


def test_a_default_may_be_stated_or_left_out(tmp_path: Path) -> None:
    folders = changed(tmp_path / "a"), changed(tmp_path / "b", hidden_act=None, attention_bias=None, mlp_bias=None)
    assert not any("hidden_act" in note for note in plan(*folders).notes)


def test_settings_without_an_effect_are_not_compared(tmp_path: Path) -> None:
    settings = {"attention_dropout": 0.5, "transformers_version": "4.0.0", "use_cache": False, "_name_or_path": "x"}
    first, second = changed(tmp_path / "a"), changed(tmp_path / "b", **settings)
    assert plan(first, second).notes == plan(first, changed(tmp_path / "c")).notes


def test_settings_for_generation_are_noted(tmp_path: Path) -> None:
    notes = plan(changed(tmp_path / "a"), changed(tmp_path / "b", max_position_embeddings=64)).notes
    assert "max_position_embeddings is 128 in 'a' and 64 in 'b'; the output has that of 'a'" in notes


def test_another_family_is_refused_by_its_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_type is 'llama' in 'a' and 'mistral' in 'b'"):
        plan(changed(tmp_path / "a"), changed(tmp_path / "b", model_type="mistral"))


def test_a_family_unknown_to_transformers_is_compared_by_what_both_state(tmp_path: Path) -> None:
    first = changed(tmp_path / "a", model_type="of_a_plugin", heads=2, only_here=1)
    notes = plan(first, changed(tmp_path / "b", model_type="of_a_plugin", heads=2)).notes
    assert any(note.startswith("only_here is 1 in 'a' and '(not stated)' in 'b'") for note in notes)
    other = changed(tmp_path / "c", model_type="of_a_plugin", heads=4)
    with pytest.raises(UserError, match="heads is 2 in 'a' and 4 in 'b'"):
        plan(first, other)


def test_a_window_that_is_switched_off_has_no_effect_and_one_that_is_on_has(tmp_path: Path) -> None:
    """Published bases and their instruct models differ in the settings of a window that neither uses."""
    off = {"use_sliding_window": False, "sliding_window": 32, "layer_types": None}
    base = changed(tmp_path / "a", "qwen2", **off, max_window_layers=2)
    instruct = changed(tmp_path / "b", "qwen2", **{**off, "sliding_window": 16}, max_window_layers=1)
    assert not any("window" in note for note in plan(base, instruct).notes)
    on = {"use_sliding_window": True, "sliding_window": 32, "layer_types": None}
    first = changed(tmp_path / "c", "qwen2", **on, max_window_layers=0)
    second = changed(tmp_path / "d", "qwen2", **on, max_window_layers=1)
    with pytest.raises(UserError, match="layer_types is"):
        plan(first, second)
