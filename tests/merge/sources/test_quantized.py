"""Quantized checkpoints: fp8 in blocks is dequantized, everything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertctl.core.artefacts.layout import Layout
from expertctl.core.errors import UserError
from expertctl.core.models.loading import load_model
from expertctl.core.testing.fixtures import tiny_model_folder
from expertctl.experts.runs.seed import import_seed
from expertctl.merge.merging import merge_recipe
from expertctl.merge.recipes.recipe import Recipe, whole_models

BLOCK = 10
WEIGHT = "model.layers.0.mlp.down_proj.weight"


def in_fp8(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Quantize the projections of a tiny model in blocks; return the folder and the weights that the codes stand for."""
    tiny_model_folder(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name, tensor in list(tensors.items()):
        expected[name] = tensor
        if "proj" not in name:
            continue
        rows, columns = tensor.shape
        scales = torch.zeros(-(-rows // BLOCK), -(-columns // BLOCK))
        codes = torch.zeros_like(tensor).to(torch.float8_e4m3fn)
        weights = torch.zeros_like(tensor)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                place = (slice(row * BLOCK, row * BLOCK + BLOCK), slice(column * BLOCK, column * BLOCK + BLOCK))
                scales[row, column] = tensor[place].abs().max() / 448
                codes[place] = (tensor[place] / scales[row, column]).to(torch.float8_e4m3fn)
                weights[place] = codes[place].float() * scales[row, column]
        tensors[name], tensors[f"{name}_scale_inv"], expected[name] = codes, scales, weights
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantize(folder, quant_method="fp8", weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic")
    return folder, expected


def quantize(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def passthrough(folder: Path, output: Path, **settings: Any) -> None:
    merge_recipe(Recipe("passthrough", {"a": folder}, whole_models(("a",)), **settings), output)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_fp8_in_blocks_is_dequantized_into_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    folder, expected = in_fp8(tmp_path / "a")
    passthrough(folder, tmp_path / "out", dtype=dtype)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name].to(kind), rtol=0, atol=0)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    load_model(tmp_path / "out")


def test_fp8_is_averaged_as_weights(tmp_path: Path) -> None:
    folder, expected = in_fp8(tmp_path / "a")
    plain = tiny_model_folder(tmp_path / "b", "llama")
    weights = {name: {"weight": 1.0} for name in ("a", "b")}
    recipe = Recipe("linear", {"a": folder, "b": plain}, whole_models(("a", "b"), weights), dtype="F32")
    merge_recipe(recipe, tmp_path / "out")
    other = load_file(plain / "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(merged[WEIGHT], (expected[WEIGHT] + other[WEIGHT]) / 2)


def test_without_a_dtype_fp8_is_refused(tmp_path: Path) -> None:
    folder, _ = in_fp8(tmp_path / "a")
    with pytest.raises(UserError, match="choose the output dtype, for example --dtype bfloat16"):
        passthrough(folder, tmp_path / "out")


def test_codes_without_scales_and_scales_of_other_shapes_are_named(tmp_path: Path) -> None:
    folder, _ = in_fp8(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    scales = tensors.pop(f"{WEIGHT}_scale_inv")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"'{WEIGHT}' has no scales"):
        passthrough(folder, tmp_path / "out", dtype="BF16")
    tensors[f"{WEIGHT}_scale_inv"] = scales[:1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit a weight in blocks of \[10, 10\]"):
        passthrough(folder, tmp_path / "out", dtype="BF16")


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "awq"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "fp8", "weight_block_size": None},
        {"bits": 4},
    ],
    ids=str,
)
def test_other_quantized_models_are_refused_in_one_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = quantize(tiny_model_folder(tmp_path / "a", "llama"), **settings)
    (tmp_path / "workspace").mkdir()
    layout = Layout(tmp_path / "workspace")
    for action in (
        lambda: import_seed(layout, folder),
        lambda: load_model(folder),
        lambda: passthrough(folder, tmp_path / "out", dtype="BF16"),
    ):
        with pytest.raises(UserError, match="is quantized") as caught:
            action()
        assert "\n" not in str(caught.value)
    assert not layout.seed.exists()
    assert not (tmp_path / "out").exists()
