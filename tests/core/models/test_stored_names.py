"""Tensors are written under the names, and in the layout, that `save_pretrained` gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES, family_folder, family_model

from expertctl.core.models.stored_names import StoredNames, checkpoint_tensors, loaded_names, stored_tensors


def test_the_experts_of_a_layer_are_two_tensors_in_memory_and_three_per_expert_in_files() -> None:
    names = StoredNames(family_model("mixtral"))
    files = names.of("model.layers.0.mlp.experts.gate_up_proj")
    assert len(files) == 8
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in files
    assert names.of("model.norm.weight") == ("model.norm.weight",)
    assert names.behind([files[0], "model.norm.weight"]) == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.norm.weight",
    }


def test_a_checkpoint_may_store_either_kind_of_names() -> None:
    model = family_model("mixtral")
    names, stored = StoredNames(model), stored_tensors(model)
    assert names.missing_in(stored) == names.missing_in(checkpoint_tensors(model)) == []
    del stored["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert names.missing_in(stored) == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert stored_tensors(model, checkpoint_tensors(model)).keys() == checkpoint_tensors(model).keys()


def test_a_group_that_is_incomplete_is_filled_up() -> None:
    model = family_model("hrm_text")  # four tensors in memory are one in files
    names, state = StoredNames(model), checkpoint_tensors(model)
    name = "model.H_module.layers.0.self_attn.k_proj.weight"
    changed = names.to_stored({name: state[name] + 1}, lambda group: {member: state[member] for member in group.memory})
    (group,) = [group for group in names.groups if name in group.memory]
    assert list(changed) == list(group.stored)
    loaded = group.to_memory(changed)
    for member, tensor in loaded.items():
        assert torch.equal(tensor, state[member] + 1 if member == name else state[member])


def test_any_names_that_transformers_loads_are_known(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "gpt2", "gpt2")
    assert loaded_names(folder, ["h.0.ln_1.weight", "transformer.wte.weight", "other"]) == {
        "h.0.ln_1.weight": ("transformer.h.0.ln_1.weight", True),
        "transformer.wte.weight": ("transformer.wte.weight", True),
    }
    folder = family_folder(tmp_path / "mixtral", "mixtral")
    loaded = loaded_names(folder, stored_tensors(family_model("mixtral")))
    assert loaded["model.layers.0.block_sparse_moe.gate.weight"] == ("model.layers.0.mlp.gate.weight", True)
    expert = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    assert loaded[expert] == ("model.layers.0.mlp.experts.down_proj", False)
    (folder / "config.json").write_text('{"model_type": "unknown"}')
    assert loaded_names(folder, ["a"]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_files_have_the_names_and_content_that_transformers_writes(family: str, tmp_path: Path) -> None:
    model = family_model(family)
    model.save_pretrained(tmp_path)
    expected, stored = load_file(tmp_path / "model.safetensors"), stored_tensors(model)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    names, state = StoredNames(model), checkpoint_tensors(model)
    for group in names.groups:
        for name, tensor in group.to_memory({stored_name: stored[stored_name] for stored_name in group.stored}).items():
            assert torch.equal(tensor, state[name])
