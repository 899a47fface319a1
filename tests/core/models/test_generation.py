"""Generation from any artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertctl.core.models.generation import Sampling, generate, generate_batch
from expertctl.core.models.loading import load_model
from expertctl.core.process.compute import SINGLE_THREAD_BYTES, threads_for_tokens
from expertctl.core.testing import tiny_model_folder


def test_small_models_generate_on_one_thread_and_the_setting_is_restored(model_folder: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    try:
        with threads_for_tokens(SINGLE_THREAD_BYTES):
            seen.append(torch.get_num_threads())
        with threads_for_tokens(SINGLE_THREAD_BYTES + 1):
            seen.append(torch.get_num_threads())
        generate(model_folder, "The fox", Sampling(max_new_tokens=2))
        seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 2]


PROMPTS = ["The fox", "def area(width, height):\n    return", "", "x"]


def texts(folder: Path, prompts: list[str], sampling: Sampling) -> list[str]:
    return [generation.text for generation in generate_batch(folder, prompts, sampling)]


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_prompts_of_a_batch_continue_as_they_do_alone(family: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / family, family)
    for sampling in (Sampling(8, temperature=0), Sampling(8, temperature=0, beams=3)):
        alone = [generate(folder, prompt, sampling) for prompt in PROMPTS]
        assert generate_batch(folder, PROMPTS, sampling) == alone


@pytest.mark.parametrize(
    ("sampling", "arguments"),
    [
        (Sampling(8, temperature=0, beams=3), {"num_beams": 3}),
        (Sampling(8, temperature=0, repetition_penalty=1.5), {"repetition_penalty": 1.5}),
        (Sampling(8, temperature=0.7, top_k=3, seed=1), {"do_sample": True, "temperature": 0.7, "top_k": 3}),
        (
            Sampling(8, temperature=1.5, min_p=0.3, top_p=0.9),
            {"do_sample": True, "temperature": 1.5, "min_p": 0.3, "top_p": 0.9, "top_k": 0},
        ),
    ],
)
def test_settings_are_those_of_transformers(model_folder: Path, sampling: Sampling, arguments: dict[str, Any]) -> None:
    model, tokenizer = load_model(model_folder)
    prompt = tokenizer("The fox", return_tensors="pt")["input_ids"]
    torch.manual_seed(sampling.seed)
    settings = {"do_sample": False, **arguments}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, **settings)
    generation = generate(model_folder, "The fox", sampling)
    assert [token.id for token in generation.continuation] == expected[0, prompt.shape[1] :].tolist()


def test_a_stop_string_ends_each_continuation_of_a_batch(model_folder: Path) -> None:
    whole = texts(model_folder, PROMPTS, Sampling(12, temperature=0))
    stop = whole[0][2:4]
    stopped = texts(model_folder, PROMPTS, Sampling(12, temperature=0, stop=(stop,)))
    assert stopped[0].endswith(stop)
    assert len(stopped[0]) < len(whole[0])
    for short, long in zip(stopped, whole, strict=True):
        assert long.startswith(short)
        assert stop not in short[: -len(stop)]
