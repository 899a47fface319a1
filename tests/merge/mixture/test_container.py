"""The container behaves as its dense model does wherever transformers' own tools look at a model."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures_of_copies import TOKENS, copies, mix
from transformers import AutoModelForCausalLM

from expertctl import load_model

LEFT_PADDED = torch.ones_like(TOKENS)
LEFT_PADDED[0, :9] = 0
LEFT_PADDED[1, :4] = 0


def pair(folder: Path, family: str, **changes: Any) -> tuple[Any, Any]:
    """Return a mixture of two copies of a model, one of which each token goes to, and the model."""
    models = copies(folder, family, 2)
    for model in models.values():
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    mixture, _ = load_model(mix(folder, models, target="container", top_k=1), dtype="float32")
    return mixture, AutoModelForCausalLM.from_pretrained(models["base"]).eval()


@pytest.mark.parametrize("given", ["mask", "padding", "inputs_embeds", "beams", "static"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("starcoder2", {"sliding_window": 5}),
    ],
)
def test_generation_is_the_dense_models(tmp_path: Path, family: str, changes: dict[str, Any], given: str) -> None:
    mixture, dense = pair(tmp_path, family, **changes)
    padded = TOKENS.clamp(min=3) * LEFT_PADDED
    inputs: dict[str, Any] = {
        "mask": {"inputs": padded, "attention_mask": LEFT_PADDED},
        "padding": {"inputs": padded},
        "inputs_embeds": {"inputs_embeds": dense.get_input_embeddings()(TOKENS)},
        "beams": {"inputs": TOKENS, "num_beams": 3},
        "static": {"inputs": TOKENS, "cache_implementation": "static"},
    }[given]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        generated, expected = (model.generate(**inputs, **settings) for model in (mixture, dense))
    assert generated.tolist() == expected.tolist()
    assert len({tuple(row) for row in generated.tolist()}) == 2, "the two rows differ, as their prompts do"


def test_generation_follows_the_mixtures_own_generation_settings(tmp_path: Path) -> None:
    mixture, _ = pair(tmp_path, "llama")
    mixture.generation_config.max_new_tokens = 3
    mixture.generation_config.eos_token_id = None
    assert mixture.generate(TOKENS).shape == (2, TOKENS.shape[1] + 3)


def test_attributes_that_tools_look_up_by_name_exist(tmp_path: Path) -> None:
    mixture, _ = pair(tmp_path, "llama")
    assert {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels"} <= set(
        signature(mixture.forward).parameters
    )


def test_checkpointed_gradients_are_the_same(tmp_path: Path) -> None:
    mixture, _ = pair(tmp_path, "llama")
    mixture.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            mixture.gradient_checkpointing_enable()
        mixture.zero_grad()
        mixture(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append(
            {
                name: parameter.grad.clone()
                for name, parameter in mixture.named_parameters()
                if parameter.grad is not None
            }
        )
    assert any("experts" in name for name in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_vocabulary_that_grew_is_trained_on_saved_and_loaded(tmp_path: Path) -> None:
    mixture, _ = pair(tmp_path, "llama")
    before = mixture(input_ids=TOKENS, labels=TOKENS)
    size = before.logits.shape[-1]
    mixture.resize_token_embeddings(size + 3, mean_resizing=False)
    after = mixture(input_ids=TOKENS, labels=TOKENS)
    assert after.logits.shape[-1] == mixture.config.vocab_size == size + 3
    torch.testing.assert_close(after.logits[..., :size], before.logits)
    mixture.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(input_ids=TOKENS).logits, after.logits)
