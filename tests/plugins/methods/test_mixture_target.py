"""A plugin adds a mixture class: it is chosen, loads in transformers with nothing missing, and experts may leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ernie_plugin
import pytest
import torch
from transformers import AutoModelForCausalLM

from expertctl import load_model
from expertctl.core.hooks.manager import installed_plugins
from expertctl.core.testing import tiny_model_folder
from expertctl.merge.merging import merge_recipe
from expertctl.merge.mixture.changing import Change
from expertctl.merge.recipes.recipe import Recipe, whole_models
from expertctl.merge.remaking.expert_changes import change_experts

TOKENS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def with_plugin() -> Iterator[None]:
    assert installed_plugins().register(ernie_plugin, "ernie")
    yield
    installed_plugins.cache_clear()


def merged(folder: Path, count: int) -> Path:
    base = folder / "base"
    if not base.exists():
        tiny_model_folder(base, "ernie4_5")
    models = {"base": base}
    for number in range(count):
        models[f"copy{number}"] = folder / f"copy{number}"
        shutil.copytree(base, models[f"copy{number}"], dirs_exist_ok=True)
    recipe = Recipe("mixture", models, whole_models(list(models)[1:]), seed="base", scopes=({"router": "random"},))
    merge_recipe(recipe, folder / f"mixture{count}")
    return folder / f"mixture{count}"


@pytest.mark.usefixtures("with_plugin")
def test_copies_of_a_model_are_that_model_in_the_plugins_class(tmp_path: Path) -> None:
    folder = merged(tmp_path, 3)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Ernie4_5_MoeForCausalLM"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    dense, _ = load_model(tmp_path / "base")
    with torch.inference_mode():
        expected = dense(input_ids=TOKENS).logits
        torch.testing.assert_close(model.eval()(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("with_plugin")
def test_experts_leave_such_a_mixture(tmp_path: Path) -> None:
    whole, less = merged(tmp_path, 3), merged(tmp_path, 2)
    change_experts(whole, tmp_path / "left", Change(remove=("copy2",)))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "left" / name).read_bytes() == (less / name).read_bytes()


def test_without_the_plugin_the_family_runs_in_the_container(tmp_path: Path) -> None:
    config = json.loads((merged(tmp_path, 2) / "config.json").read_text())
    assert config["architectures"] == ["MixtureForCausalLM"]


def test_the_plugin_is_short() -> None:
    assert len(Path(str(ernie_plugin.__file__)).read_text().splitlines()) < 100
