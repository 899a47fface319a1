"""Contrastive and context-aware decoding and DExperts, against float64 without cache, batch and padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_decoding import Scores, beam_search, double_model, greedy, last_logits
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from expertctl import DecodingRow, RowsModel, UserError
from expertctl.core.models.adapters.prompts import fixed_prompt, with_prompt
from expertctl.core.models.decoding.opening import DecoderChoice, OpenedDecoder, check_decoder
from expertctl.core.models.decoding.wrapped import positions_of
from expertctl.core.models.generation import Sampling, continue_prompts
from expertctl.core.models.loading import load_model
from expertctl.core.testing import tiny_model_folder

CONTEXT = "The court of the first"
PROMPTS = ("The fox", "def area(width, height): whereas", "x", "Größe, façade")
COUNT = 5


@dataclass(frozen=True)
class Models:
    folders: dict[str, Path]
    doubles: dict[str, PreTrainedModel]


@pytest.fixture(scope="module", params=["olmo2", "gpt2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Three models of a family: with rotary positions, and with learned ones, which padding must not move."""
    root = tmp_path_factory.mktemp(request.param)
    folders = {
        name: tiny_model_folder(root / name, request.param, seed=seed)
        for seed, name in enumerate(("expert", "amateur", "other"))
    }
    return Models(folders, {name: double_model(folder) for name, folder in folders.items()})


def original(models: Models, context: list[int]) -> Scores:
    def scores(text: Any) -> torch.Tensor:
        expert, amateur = (last_logits(models.doubles[name], text).log_softmax(-1) for name in ("expert", "amateur"))
        plausible = expert.exp() >= 0.1 * expert.exp().max()
        return (expert - amateur).masked_fill(~plausible, -math.inf)

    return scores


def reasoning(models: Models, context: list[int]) -> Scores:
    def scores(text: Any) -> torch.Tensor:
        expert, amateur = (last_logits(models.doubles[name], text) for name in ("expert", "amateur"))
        plausible = expert >= expert.max() + math.log(0.2)
        return (1.7 * expert - 0.7 * amateur).masked_fill(~plausible, -math.inf).log_softmax(-1)

    return scores


def context_aware(models: Models, context: list[int]) -> Scores:
    def scores(text: Any) -> torch.Tensor:
        model = models.doubles["expert"]
        logits = 2.0 * last_logits(model, [*context, *text]) - 1.0 * last_logits(model, text)
        return logits.log_softmax(-1)

    return scores


def against_seed(models: Models, context: list[int]) -> Scores:
    def scores(text: Any) -> torch.Tensor:
        expert, amateur, other = (
            last_logits(models.doubles[name], text).log_softmax(-1) for name in ("expert", "amateur", "other")
        )
        return (expert + 0.8 * (other - amateur) - 0.3 * (expert - amateur)).log_softmax(-1)

    return scores


CASES: dict[str, tuple[str, Callable[[Models], dict[str, Any]], Callable[[Models, list[int]], Scores]]] = {
    "original": ("contrastive", lambda models: {"amateur": "amateur"}, original),
    "reasoning": (
        "contrastive",
        lambda models: {"amateur": "amateur", "form": "reasoning", "beta": 0.7, "alpha": 0.2},
        reasoning,
    ),
    "context": ("context_aware", lambda models: {"context": CONTEXT, "alpha": 1.0}, context_aware),
    "against seed": (
        "experts_against_seed",
        lambda models: {"weights": {"other": 0.8, "expert": -0.3}, "seed": "amateur"},
        against_seed,
    ),
}


@dataclass(frozen=True)
class Case:
    opened: OpenedDecoder
    scores: Scores
    tokenizer: Any
    prompts: list[list[int]]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, models: Models) -> Case:
    name, options, reference = CASES[request.param]
    model, tokenizer = load_model(models.folders["expert"])
    model.generation_config.eos_token_id = None  # so that all continuations are of one length
    checked = check_decoder(DecoderChoice(name, options(models), models.folders.__getitem__))
    context = tokenizer(CONTEXT)["input_ids"]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return Case(checked.open(model, tokenizer), reference(models, context), tokenizer, prompts)


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def test_the_distribution_is_that_of_the_paper(case: Case) -> None:
    with torch.no_grad():
        logits = case.opened.model(**left_padded(case.prompts)).logits[:, -1].double()
    for row, prompt in zip(logits, case.prompts, strict=True):
        torch.testing.assert_close(row.softmax(-1), case.scores(prompt).softmax(-1), atol=1e-5, rtol=0)


def test_every_position_of_a_text_has_the_distribution_of_the_paper(case: Case) -> None:
    text = case.prompts[1]
    with torch.no_grad():
        logits = case.opened.model(input_ids=torch.tensor([text])).logits[0].double()
    for position in range(len(text)):
        expected = case.scores(text[: position + 1]).softmax(-1)
        torch.testing.assert_close(logits[position].softmax(-1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_are_those_of_the_reference_alone_and_in_a_padded_batch(case: Case, use_cache: bool) -> None:
    expected = [greedy(case.scores, prompt, COUNT) for prompt in case.prompts]
    case.opened.model.generation_config.use_cache = use_cache
    sampling = Sampling(COUNT, temperature=0)
    assert continue_prompts(case.opened, case.tokenizer, case.prompts, sampling) == expected
    assert continue_prompts(case.opened, case.tokenizer, case.prompts[:1], sampling) == expected[:1]


def test_beams_are_those_of_the_reference_alone_and_in_a_padded_batch(case: Case) -> None:
    expected = [beam_search(case.scores, prompt, COUNT, 3) for prompt in case.prompts]
    sampling = Sampling(COUNT, temperature=0, beams=3)
    assert continue_prompts(case.opened, case.tokenizer, case.prompts, sampling) == expected
    assert continue_prompts(case.opened, case.tokenizer, case.prompts[:1], sampling) == expected[:1]


def test_a_cache_is_used(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    base = case.opened.model.base
    base.register_forward_pre_hook(
        lambda module, arguments, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    continue_prompts(case.opened, case.tokenizer, case.prompts, Sampling(COUNT, temperature=0))
    assert lengths.count(1) >= COUNT - 1


def test_each_prompt_of_a_batch_can_have_its_own_context(models: Models) -> None:
    contexts = ("The court", "", "of the first instance", "x")
    model, tokenizer = load_model(models.folders["expert"])
    model.generation_config.eos_token_id = None
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    options = {"context": contexts, "alpha": 1.0}
    opened = check_decoder(DecoderChoice("context_aware", options)).open(model, tokenizer)
    for beams in (1, 2):
        found = continue_prompts(opened, tokenizer, prompts, Sampling(COUNT, temperature=0, beams=beams))
        for context, prompt, tokens in zip(contexts, prompts, found, strict=True):
            scores = context_aware(models, tokenizer(context)["input_ids"] if context else [])
            assert tokens == beam_search(scores, prompt, COUNT, beams)
    with pytest.raises(UserError, match="4 contexts do not fit 3 texts"):
        continue_prompts(opened, tokenizer, prompts[:3], Sampling(COUNT, temperature=0))


def test_a_context_stands_behind_the_token_that_begins_a_text(models: Models) -> None:
    model, _ = load_model(models.folders["expert"])
    wrapped = RowsModel(model, [DecodingRow(model, contexts=((5, 6, 7),))], begin=[0])
    with torch.no_grad():
        logits = wrapped(input_ids=torch.tensor([[0, 8, 9], [8, 9, 10]])).logits[:, -1]
    double = models.doubles["expert"]
    for row, text in zip(logits.double(), ([0, 5, 6, 7, 8, 9], [0, 5, 6, 7, 8, 9, 10]), strict=True):
        torch.testing.assert_close(row.softmax(-1), last_logits(double, text).softmax(-1), atol=1e-5, rtol=0)


def test_a_text_can_be_continued_in_a_cache_without_a_mask(case: Case) -> None:
    text = torch.tensor([case.prompts[1]])
    with torch.no_grad():
        whole = case.opened.model(input_ids=text).logits
        first = case.opened.model(input_ids=text[:, :3], use_cache=True)
        rest = case.opened.model(input_ids=text[:, 3:], past_key_values=first.past_key_values, use_cache=True)
    assert rest.past_key_values.get_seq_length() == text.shape[1]
    pieces = torch.cat((first.logits, rest.logits), dim=1)
    torch.testing.assert_close(pieces.softmax(-1), whole.softmax(-1), atol=1e-5, rtol=0)


def test_a_model_with_a_prompt_of_its_own_reads_it_before_the_context(models: Models) -> None:
    model, tokenizer = load_model(models.folders["expert"])
    with_prompt(model, fixed_prompt(torch.randn(3, 16, generator=torch.Generator().manual_seed(0))))
    model.generation_config.eos_token_id = None
    opened = check_decoder(DecoderChoice("context_aware", {"context": CONTEXT})).open(model, tokenizer)
    assert positions_of(opened.model) == 128 - 3 - len(tokenizer(CONTEXT)["input_ids"])
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    sampling = Sampling(COUNT, temperature=0)
    together = continue_prompts(opened, tokenizer, prompts, sampling)
    opened.model.generation_config.use_cache = False
    assert together == [continue_prompts(opened, tokenizer, [prompt], sampling)[0] for prompt in prompts]


def test_a_model_with_fewer_tokens_is_refused(models: Models) -> None:
    model, _ = load_model(models.folders["expert"])
    config = AutoConfig.for_model("llama", vocab_size=299, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="predicts 300 tokens and another model of the decoder 299"):
        RowsModel(model, [DecodingRow(model), DecodingRow(other)])


def test_padding_on_the_right_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="padded on the left"):
        case.opened.model(input_ids=torch.tensor([[1, 2]]), attention_mask=torch.tensor([[1, 0]]))
