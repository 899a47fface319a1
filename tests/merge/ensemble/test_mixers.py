"""A plugin's mixer: the one of the documentation, from merging to generation, saving and losing an expert."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from expertctl import UserError, Workspace, load_model
from expertctl.core.artefacts.files import read_json, write_json
from expertctl.core.hooks.manager import installed_plugins

PLUGINS_PAGE = Path(__file__).parents[3] / "docs" / "plugins.md"
IDS = torch.tensor([[5, 9, 40, 8, 72, 41, 8, 3, 17, 60, 22, 90, 14, 33, 71, 2, 65, 11]])
EXPERTS = ("code", "law")


@pytest.fixture
def turns() -> Iterator[None]:
    """The mixer `turns` of docs/plugins.md, which gives each expert eight tokens in turn."""
    section = PLUGINS_PAGE.read_text(encoding="utf-8").split("### mixers()")[1]
    source = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert source is not None
    plugin = ModuleType("turns_plugin")
    exec(source[1], vars(plugin))
    assert installed_plugins().register(plugin, "turns_plugin")
    yield
    installed_plugins.cache_clear()


@pytest.fixture
def ensemble(turns: None, new_workspace: Any, tmp_path: Path) -> Workspace:
    workspace = Workspace(new_workspace(tmp_path / "ws", EXPERTS))
    workspace.merge("forest", method="ensemble", experts=EXPERTS, options={"mixer": "turns"})
    return workspace


def test_each_position_is_predicted_by_the_expert_of_its_turn(ensemble: Workspace) -> None:
    model, _ = load_model(ensemble.generalists / "forest")
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits
        alone = [load_model(ensemble.experts / name)[0](input_ids=IDS).logits.log_softmax(-1) for name in EXPERTS]
    for begin, expert in ((0, 0), (8, 1), (16, 0)):
        torch.testing.assert_close(logits[:, begin : begin + 8], alone[expert][:, begin : begin + 8])
    assert model.responsibilities(IDS)[0, :, 0].tolist() == [1.0] * 8 + [0.0] * 8 + [1.0]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_cache_keeps_its_state(ensemble: Workspace, beams: int) -> None:
    model, _ = load_model(ensemble.generalists / "forest")
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    cached = model.generate(IDS[:, :5], use_cache=True, **settings)
    assert cached.equal(model.generate(IDS[:, :5], use_cache=False, **settings))


def test_it_is_saved_and_loses_an_expert(ensemble: Workspace, tmp_path: Path) -> None:
    model, tokenizer = load_model(ensemble.generalists / "forest")
    model.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    again, _ = load_model(tmp_path / "copy")
    assert again(input_ids=IDS).logits.equal(model(input_ids=IDS).logits)
    manifest = ensemble.generalists.change_experts("forest", "tree", remove=["code"])
    law, _ = load_model(ensemble.experts / "law")
    tree, _ = load_model(ensemble.generalists / "tree")
    switched_off, _ = load_model(ensemble.generalists / "forest", without=["code"])
    assert manifest.experts == ("law",)
    expected = law(input_ids=IDS).logits.log_softmax(-1)
    torch.testing.assert_close(tree(input_ids=IDS).logits, expected)
    torch.testing.assert_close(switched_off(input_ids=IDS).logits, expected)


def test_options_belong_to_the_mixer(ensemble: Workspace) -> None:
    for options, message in (
        ({"mixer": "turns", "prior": "uniform"}, "no option 'prior'; it has: mixer"),
        ({"mixer": "turnz"}, r"no mixer 'turnz' \(did you mean 'turns'\?\)"),
    ):
        with pytest.raises(UserError, match=message):
            ensemble.merge("other", method="ensemble", experts=EXPERTS, options=options)


def test_an_ensemble_of_an_older_format_is_refused_by_name(ensemble: Workspace) -> None:
    config = ensemble.generalists / "forest" / "config.json"
    content = read_json(config)
    del content["mixer_settings"]
    write_json(config, {**content, "prior": [0.5, 0.5]})
    with pytest.raises(
        UserError, match="has no mixer_settings, as ensembles of older versions; merge the ensemble again"
    ):
        load_model(ensemble.generalists / "forest")


def test_demix_adds_no_expert_to_an_ensemble_with_another_mixer(ensemble: Workspace) -> None:
    from expertctl.plugins.methods.demix.plugin import DemixAdaptation, require_shared_layers

    with pytest.raises(UserError, match="needs an ensemble with mixer 'posterior', and 'forest' has 'turns'"):
        require_shared_layers(ensemble.generalists / "forest", DemixAdaptation(), ["news"])
