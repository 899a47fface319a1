"""The attention kernel by choice: same losses, refusals with the reason, and long blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expertctl import UserError
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
from expertctl.experts.runs.trainable import all_parameters
from expertctl.experts.training.steps.attention import choose_attention
from expertctl.experts.training.steps.loop import TrainingLoop

SEPARATOR, VOCABULARY = 3, 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 8192,
}
CONFIG = TrainingConfig(tokens=4 * 2 * 32, sequence_length=32, batch_size=2, learning_rate=1e-2, device="cpu")


def model_of(family: str = "llama") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES), dtype=torch.float32)


def blocks_of(folder: Path, length: int, documents: int, tokens: int, words: int = VOCABULARY) -> TokenBlocks:
    ids = np.random.default_rng(0).integers(4, words, size=(documents, tokens)).tolist()
    write_part(folder, [EncodedDocument("x", row) for row in ids], separator=SEPARATOR, vocabulary=VOCABULARY)
    return TokenBlocks(TokenStore(folder), length)


@pytest.mark.parametrize("separate", [False, True])
def test_kernels_have_the_same_losses(separate: bool, tmp_path: Path) -> None:
    blocks, losses = blocks_of(tmp_path, 32, 60, 7), {}
    for kernel in ("auto", "eager", "sdpa"):
        model = model_of()
        config = CONFIG.model_copy(update={"attention": kernel, "separate_documents": separate})
        loop = TrainingLoop(all_parameters(model), blocks, config, separator=SEPARATOR)
        assert model.config._attn_implementation == ("sdpa" if kernel == "auto" else kernel)
        losses[kernel] = [float(report.loss) for report in loop.steps()]
        model.save_pretrained(tmp_path / "saved")
        assert "attn" not in (tmp_path / "saved" / "config.json").read_text()  # how it was trained is no part of it
    assert losses["sdpa"] == losses["auto"]
    assert losses["eager"] == pytest.approx(losses["sdpa"], abs=1e-5)


@pytest.mark.parametrize(
    ("family", "kernel", "reason"),
    [
        ("llama", "flash_attention_2", "training with it needs a GPU, and this run is on cpu"),
        ("llama", "flex_attention", "training with it needs a GPU, and this run is on cpu"),
        ("bloom", "sdpa", "BloomForCausalLM"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused_before_training(
    family: str, kernel: str, reason: str, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"attention": kernel})
    with pytest.raises(UserError, match=f"training.attention: {kernel} is not available .*{reason}"):
        TrainingLoop(all_parameters(model_of(family)), blocks_of(tmp_path, 32, 60, 7), config)


def test_kernels_of_gpus_are_refused_for_the_precision_and_what_is_installed() -> None:
    gpu, config = torch.device("cuda"), CONFIG.model_copy(update={"attention": "flash_attention_2"})
    with pytest.raises(UserError, match=r"it computes in 16 bits, and this run in float32; set precision: bfloat16"):
        choose_attention(model_of(), config, gpu, bfloat16=False)
    with pytest.raises(UserError, match="LlamaForCausalLM: FlashAttention2 has been toggled on, but it cannot be used"):
        choose_attention(model_of(), config, gpu, bfloat16=True)
    with pytest.raises(UserError, match="Linear is not a model of transformers"):
        choose_attention(torch.nn.Linear(2, 2), CONFIG.model_copy(update={"attention": "sdpa"}), gpu, bfloat16=True)


def test_documents_that_a_kernel_keeps_apart_in_single_blocks_only_are_refused_in_several(tmp_path: Path) -> None:
    """As flash attention, which looks at positions only if there is one row."""
    blocks, model = blocks_of(tmp_path, 32, 60, 7), model_of()
    forward = model.forward

    def like_flash(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 1:
            inputs.pop("position_ids", None)
        return forward(**inputs)

    model.forward = like_flash
    config = CONFIG.model_copy(update={"separate_documents": True})
    with pytest.raises(UserError, match=r"this model \(sdpa, 2 blocks at a time\) cannot keep the documents .* apart"):
        TrainingLoop(all_parameters(model), blocks, config, separator=SEPARATOR)
    single = config.model_copy(update={"batch_size": 1, "accumulation": 2})
    TrainingLoop(all_parameters(model), blocks, single, separator=SEPARATOR)


@pytest.mark.parametrize("separate", [False, True])
def test_a_block_of_8192_tokens_trains(separate: bool, tmp_path: Path) -> None:
    blocks = blocks_of(tmp_path, 8192, 10, 2000, words=8)
    settings = {"tokens": 2 * 8192, "sequence_length": 8192, "batch_size": 1, "attention": "sdpa"}
    memory = {"chunked_loss": True, "activation_checkpointing": True, "separate_documents": separate}
    config = CONFIG.model_copy(update={**settings, **memory})
    loop = TrainingLoop(all_parameters(model_of()), blocks, config, separator=SEPARATOR)
    losses = [float(report.loss) for report in loop.steps()]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(np.log(VOCABULARY), abs=0.2)
    assert losses[1] < losses[0]
