"""Merges of architectures beyond plain decoders: transformers loads the result, and its tensors are the mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertctl.core.errors import UserError
from expertctl.core.testing.fixtures import tiny_model_folder
from expertctl.merge.merging import merge_recipe, plan_recipe
from expertctl.merge.recipes.recipe import OutputSlice, Recipe, SourceSlice, whole_models

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
ENCODER_DECODER = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 40,
}


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    special = {"image_token_index": 39, "boi_token_index": 38, "eoi_token_index": 37}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, **special)
    )


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
            image_token_index=39,
        )
    )


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(**ENCODER_DECODER, max_position_embeddings=32))


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    positions = {"max_source_positions": 20, "max_target_positions": 20}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    return WhisperForConditionalGeneration(WhisperConfig(**ENCODER_DECODER, **positions, **tokens))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40))


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**VISION))


def relatives(folder: Path, make: Callable[[], Any]) -> tuple[Any, dict[str, Path]]:
    """Write two models that differ a little from the same initialisation."""
    folders = {}
    for number, name in enumerate("ab"):
        torch.manual_seed(0)
        model = make()
        torch.manual_seed(number + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        folders[name] = folder / name
        model.save_pretrained(folders[name])
    return type(model), folders


def average(folders: Mapping[str, Path], output: Path) -> None:
    merge_recipe(Recipe("linear", folders, whole_models(tuple(folders), {n: {"weight": 1.0} for n in folders})), output)


@pytest.mark.parametrize("make", [gemma3, llava, bart, whisper, t5, vit])
def test_an_average_is_the_mean_in_transformers(make: Callable[[], Any], tmp_path: Path) -> None:
    model_class, folders = relatives(tmp_path, make)
    average(folders, tmp_path / "out")
    merged, report = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    first, second = (model_class.from_pretrained(folder).state_dict() for folder in folders.values())
    for name, tensor in merged.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


def test_layers_of_an_encoder_decoder_cannot_be_selected(tmp_path: Path) -> None:
    _, folders = relatives(tmp_path, bart)
    recipe = Recipe("passthrough", {"a": folders["a"]}, (OutputSlice((SourceSlice("a", (0, 2)),)),))
    with pytest.raises(UserError, match="layers of this architecture cannot be selected"):
        plan_recipe(recipe, None)


def test_layers_of_the_text_part_are_selected_in_its_own_configuration(tmp_path: Path) -> None:
    def text_heavy() -> Any:
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        special = {"image_token_index": 39, "boi_token_index": 38, "eoi_token_index": 37}
        deep = {**TEXT, "num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=deep, vision_config=VISION, mm_tokens_per_image=4, **special)
        )

    model_class, folders = relatives(tmp_path, text_heavy)
    slices = (OutputSlice((SourceSlice("a", (0, 1)),)), OutputSlice((SourceSlice("a", (4, 6)),)))
    merge_recipe(Recipe("passthrough", {"a": folders["a"]}, slices), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3
    assert config["text_config"]["layer_types"] == ["sliding_attention"] * 2 + ["full_attention"]
    assert config["vision_config"]["num_hidden_layers"] == 3
    _, report = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())


def test_an_untied_head_is_stated_even_where_the_tie_was_a_default(tmp_path: Path) -> None:
    _, folders = relatives(tmp_path, gemma3)
    for number, folder in enumerate(folders.values()):
        config = json.loads((folder / "config.json").read_text())
        for part in (config, config["text_config"]):
            part.pop("tie_word_embeddings", None)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
        tensors["lm_head.weight"] = embedding.flip(0).contiguous() + number
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    average(folders, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(30, 42)[None]).logits  # type: ignore[no-any-return]


def tied_model(folder: Path, seed: int, head: str) -> Path:
    """Write a model whose configuration ties the head, with a stored head: a `copy` of the embedding or `another`."""
    tiny_model_folder(folder, "llama", tied=True, seed=seed)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if head == "copy" else embedding.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("states_tie", [True, False], ids=["stated", "by default"])
def test_a_stored_head_that_differs_from_a_tied_embedding_is_merged(tmp_path: Path, states_tie: bool) -> None:
    folder = tied_model(tmp_path / "a", 0, "another")
    config = json.loads((folder / "config.json").read_text())
    if not states_tie:
        del config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
    average({"a": folder}, tmp_path / "out")
    config["tie_word_embeddings"] = False  # what transformers does on seeing both tensors
    (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), rtol=0, atol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_model_merges_with_one_that_has_a_head_of_its_own(tmp_path: Path) -> None:
    folders = {"a": tied_model(tmp_path / "a", 0, "another"), "b": tied_model(tmp_path / "b", 0, "copy")}
    average(folders, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    first, second = (load_file(folder / "model.safetensors")["lm_head.weight"] for folder in folders.values())
    torch.testing.assert_close(merged["lm_head.weight"], (first + second) / 2)
