"""Stored tensors overwrite those of a model, whatever their layout in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import family_model

from expertctl import UserError
from expertctl.core.artefacts.safetensors_io import Checkpoint
from expertctl.core.models.overlay import Overlay, overlay_tensors, tensors_in_memory
from expertctl.core.models.stored_names import checkpoint_tensors, stored_tensors

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def changed_names(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_one_matrix_of_one_expert_is_overwritten() -> None:
    model = family_model("mixtral")
    before = {name: tensor.clone() for name, tensor in stored_tensors(model).items()}
    overlay_tensors(model, {EXPERT: before[EXPERT] + 1})
    after = stored_tensors(model)
    assert changed_names(before, after) == [EXPERT]
    assert torch.equal(after[EXPERT], before[EXPERT] + 1)


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox", "granitemoe", "hrm_text"])
def test_all_tensors_can_be_given_by_their_names_in_files_or_in_memory(family: str) -> None:
    source, in_files, in_memory = family_model(family, 1), family_model(family), family_model(family)
    overlay_tensors(in_files, stored_tensors(source))
    overlay_tensors(in_memory, checkpoint_tensors(source))
    for model in (in_files, in_memory):
        assert changed_names(checkpoint_tensors(source), checkpoint_tensors(model)) == []


def test_tensors_come_one_by_one() -> None:
    source, model = family_model("mixtral", 1), family_model("mixtral")
    overlay = Overlay(model)
    for name, tensor in reversed(stored_tensors(source).items()):
        overlay.add(name, tensor)
    overlay.finish()
    assert changed_names(checkpoint_tensors(source), checkpoint_tensors(model)) == []


def test_a_model_can_stay_as_it_is(tmp_path: Path) -> None:
    model = family_model("hrm_text")
    before = {name: tensor.clone() for name, tensor in checkpoint_tensors(model).items()}
    name = "model.L_module.layers.0.mlp.gate_up_proj.weight"
    save_file({name: stored_tensors(model)[name] + 1}, tmp_path / "expert.safetensors")
    loaded = tensors_in_memory(model, Checkpoint([tmp_path / "expert.safetensors"]))
    block = "model.L_module.layers.0.mlp"
    assert loaded.keys() == {f"{block}.gate_proj.weight", f"{block}.up_proj.weight"}
    assert all(torch.equal(tensor, before[name] + 1) for name, tensor in loaded.items())
    assert changed_names(before, checkpoint_tensors(model)) == []


def test_a_tensor_of_another_family_is_refused() -> None:
    with pytest.raises(UserError, match=r"the model has no tensor 'model\.layers\.0\.mlp\.experts\.0\.w1\.weight'"):
        overlay_tensors(family_model("mixtral"), {"model.layers.0.mlp.experts.0.w1.weight": torch.ones(1)})
