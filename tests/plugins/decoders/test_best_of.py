"""The best of several samples, against scores that are computed one by one in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive_decoding import double_model, last_logits
from transformers import PreTrainedModel

from expertctl import UserError
from expertctl.core.models.decoding.opening import DecoderChoice, check_decoder
from expertctl.core.models.generation import Sampling, continue_prompts
from expertctl.core.models.loading import load_model
from expertctl.core.testing import tiny_model_folder
from expertctl.plugins.decoders.best_of import is_degenerate

PROMPTS = ("The fox", "def area(width, height)")
SAMPLING = Sampling(6, temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("best")
    return {name: tiny_model_folder(root / name, seed=seed) for seed, name in enumerate(("expert", "other"))}


def log_prob(model: PreTrainedModel, prefix: list[int], target: list[int]) -> float:
    text = [*prefix, *target]
    logits = (last_logits(model, text[:end]).log_softmax(-1)[text[end]] for end in range(len(prefix), len(text)))
    return float(sum(logits))


def drawn(folder: Path, count: int) -> tuple[Any, list[list[int]], list[list[list[int]]]]:
    """Return the tokenizer, the prompts and the samples that the decoder draws."""
    model, tokenizer = load_model(folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    seen: list[list[list[int]]] = []

    def keep(prompt: Any, samples: Any) -> list[float]:
        seen.append([list(sample) for sample in samples])
        return [0.0] * len(samples)

    checked = check_decoder(DecoderChoice("best_of", {"samples": count}))
    opened = checked.open(model, tokenizer)
    assert opened.samples is not None
    torch.manual_seed(SAMPLING.seed)
    continue_prompts(type(opened)(opened.model, type(opened.samples)(count, keep)), tokenizer, prompts, SAMPLING)
    return tokenizer, prompts, seen


@pytest.mark.parametrize(
    ("options", "judge"),
    [({}, "expert"), ({"judge": "other"}, "other"), ({"by": "reviewer"}, "expert"), ({"mean": False}, "expert")],
)
def test_the_sample_with_the_best_score_is_kept(folders: dict[str, Path], options: dict[str, Any], judge: str) -> None:
    tokenizer, prompts, samples = drawn(folders["expert"], 5)
    double = double_model(folders[judge])

    def score(prompt: list[int], sample: list[int]) -> float:
        text = tokenizer.decode(sample, skip_special_tokens=True)
        per_token = options.get("mean", True)
        total = log_prob(double, prompt, sample) / (len(sample) if per_token else 1)
        if options.get("by") == "reviewer":
            total += log_prob(double, tokenizer(text + "\n")["input_ids"], prompt) / len(prompt)
        return total

    expected = [
        max(group, key=lambda sample: score(prompt, sample)) for prompt, group in zip(prompts, samples, strict=True)
    ]
    model, tokenizer = load_model(folders["expert"])
    choice = DecoderChoice("best_of", {"samples": 5, **options}, folders.__getitem__)
    opened = check_decoder(choice).open(model, tokenizer)
    torch.manual_seed(SAMPLING.seed)
    assert continue_prompts(opened, tokenizer, prompts, SAMPLING) == expected


def test_empty_and_repeated_samples_come_last(folders: dict[str, Path]) -> None:
    model, tokenizer = load_model(folders["expert"])
    samples = check_decoder(DecoderChoice("best_of")).open(model, tokenizer).samples
    assert samples is not None
    repeated = tokenizer("the " * 20)["input_ids"]
    scores = samples.score(tokenizer("The fox")["input_ids"], [[], repeated, tokenizer("jumps")["input_ids"]])
    assert scores[:2] == [float("-inf")] * 2
    assert scores[2] > float("-inf")
    assert is_degenerate(" \n")
    assert not is_degenerate("def area(width, height):")


@pytest.mark.parametrize("sampling", [Sampling(4, temperature=0), Sampling(4, beams=2)])
def test_samples_that_are_all_equal_are_refused(folders: dict[str, Path], sampling: Sampling) -> None:
    model, tokenizer = load_model(folders["expert"])
    opened = check_decoder(DecoderChoice("best_of")).open(model, tokenizer)
    with pytest.raises(UserError, match="temperature above 0"):
        continue_prompts(opened, tokenizer, [[5, 6]], sampling)


def test_more_tokens_than_the_judge_has_positions_are_refused(folders: dict[str, Path]) -> None:
    model, tokenizer = load_model(folders["expert"])
    samples = check_decoder(DecoderChoice("best_of")).open(model, tokenizer).samples
    assert samples is not None
    with pytest.raises(UserError, match="judge reads 130 tokens"):
        samples.score([5] * 100, [list(range(20, 50))])
