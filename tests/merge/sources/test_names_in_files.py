"""Models whose files name or arrange the tensors differently are merged by what they are, or refused for that reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import family_folder, family_model
from toy_models import recipe, tensors_of

from expertctl import UserError
from expertctl.core.artefacts.files import write_json
from expertctl.core.artefacts.safetensors_io import write_tensors
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.models.stored_names import checkpoint_tensors, stored_tensors
from expertctl.merge.extraction import extract_adapter
from expertctl.merge.merging import merge_recipe
from expertctl.merge.sources.models import open_sources
from expertctl.workspace import Workspace

NEOX_HEAD = "embed_out.weight"


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.fixture
def neox(tmp_path: Path) -> dict[str, Path]:
    """Two models of which the second has names in memory."""
    first, second = (family_folder(tmp_path / name, "gpt_neox") for name in ("first", "second"))
    tensors = checkpoint_tensors(family_model("gpt_neox"))
    write(second, {name: 1.5 * tensor for name, tensor in tensors.items()})
    return {"first": first, "second": second}


def test_a_merge_has_the_names_of_its_first_model(neox: dict[str, Path], tmp_path: Path) -> None:
    merge_recipe(recipe("linear", neox), tmp_path / "merged")
    first, merged = tensors_of(neox["first"]), tensors_of(tmp_path / "merged")
    assert merged.keys() == first.keys()
    assert NEOX_HEAD in merged
    for name in merged:
        torch.testing.assert_close(merged[name], 1.25 * first[name])


def test_the_digest_of_a_renamed_model_is_that_of_its_files(neox: dict[str, Path]) -> None:
    sources = open_sources(neox, None)
    renamed, plain = sources["second"], open_sources({"second": neox["second"]}, None)["second"]
    assert renamed.renamed == {"lm_head.weight": NEOX_HEAD}
    head = renamed.tensors[NEOX_HEAD].entry
    assert renamed.digest({head: plain.checkpoint.digest("lm_head.weight")}) == plain.digest({})


def test_experts_in_one_tensor_and_in_several_are_refused(tmp_path: Path) -> None:
    models = {name: family_folder(tmp_path / name, "qwen3_moe") for name in ("first", "second")}
    write(models["second"], checkpoint_tensors(family_model("qwen3_moe")))
    with pytest.raises(
        UserError, match=r"same tensors in different layouts \('.*experts.*', '.*experts\.\w+_proj'\); load"
    ):
        merge_recipe(recipe("linear", models), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_missing_bias_is_not_taken_for_a_buffer(tmp_path: Path) -> None:
    models = {name: family_folder(tmp_path / name, "gpt2") for name in ("first", "second")}
    tensors = load_file(models["second"] / "model.safetensors")
    del tensors["transformer.h.0.attn.c_attn.bias"]
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a buffer that old checkpoints have
    write(models["second"], tensors)
    with pytest.raises(UserError, match=r"'transformer\.h\.0\.attn\.c_attn\.bias' is in 'first' .* not in 'second'"):
        merge_recipe(recipe("linear", models), tmp_path / "merged")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_output_head_has_its_name_in_memory(neox: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = family_model("gpt_neox")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head", "dense"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = stored_tensors(wrapped.merge_and_unload())
    models = {"first": neox["first"], "adapter": tmp_path / "adapter"}
    merge_recipe(recipe("linear", models, seed="first"), tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_extracted_adapter_has_names_in_memory(neox: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    changed = {
        name: 1.5 * tensor if tensor.ndim == 2 and "embed_in" not in name else tensor
        for name, tensor in tensors_of(neox["first"]).items()
    }
    write(neox["second"], changed)
    report = extract_adapter(neox["first"], neox["second"], tmp_path / "lora", rank=1000)
    assert "lm_head.weight" in {matrix.name for matrix in report.tensors}
    model = peft.PeftModel.from_pretrained(family_model("gpt_neox"), tmp_path / "lora").merge_and_unload()
    for name, tensor in stored_tensors(model).items():
        torch.testing.assert_close(tensor, changed[name], rtol=1e-4, atol=1e-4)


def test_tensors_that_are_a_part_of_one_in_memory_are_left_out_of_an_adapter(tmp_path: Path) -> None:
    first, second = (family_folder(tmp_path / str(seed), "mixtral", seed) for seed in (0, 1))
    report = extract_adapter(first, second, tmp_path / "lora", rank=2)
    assert all(".experts." not in matrix.name for matrix in report.tensors)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in report.left_out
    assert (
        "model.layers.0.mlp.gate"
        in json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"]
    )


def test_statistics_of_tensors_in_memory_are_not_ignored(tmp_path: Path, new_workspace: Any) -> None:
    root = new_workspace(tmp_path / "ws", ["a", "b"], family="gpt_neox")
    for name in ("a", "b"):
        folder = root / "statistics" / name / "fisher"
        folder.mkdir(parents=True)
        write_tensors(folder / "statistics.safetensors", {"lm_head.weight": torch.ones(300, 16)})
        digest = read_manifest(root / "experts" / name).digest
        write_json(folder / "statistics.json", {"format": 1, "expert_digest": digest, "tensors": {}})
    with pytest.raises(UserError, match=r"of tensor 'lm_head\.weight', which the files of expert 'a' do not have"):
        Workspace(root).merge("m", method="fisher")
