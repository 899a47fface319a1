"""Text generation with each expert's responsibility for each token. Shapes: B = texts, T = tokens, K = experts."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError, unknown_name
from ..process.compute import best_device, threads_for_tokens
from ..process.placement import DeviceMap
from ..reporting import SILENT, Reporter
from ..text.tokenizer import missing_row
from .adapters.prompts import prompt_tokens_of
from .decoding.opening import DecoderChoice, OpenedDecoder, check_decoder
from .loading import load_model, require_intact_models
from .scoring import begin_text


@dataclass(frozen=True)
class GeneratedToken:
    """One token of the prompt or the continuation."""

    id: int
    text: str
    """Decoded text; for a character of several tokens, empty for all but the last."""
    shares: Mapping[str, float] | None
    """Responsibility of each expert, summing to 1; None for the first token or if not requested."""


@dataclass(frozen=True)
class Generation:
    """A prompt and its continuation."""

    prompt: tuple[GeneratedToken, ...]
    continuation: tuple[GeneratedToken, ...]
    experts: tuple[str, ...]
    """Names of the experts in `shares`; empty if not requested."""

    @property
    def text(self) -> str:
        """The continuation."""
        return "".join(token.text for token in self.continuation)


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled, and how many are."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    """0 is greedy decoding."""
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    """Sample only from so many of the most probable tokens; 0: from all."""
    min_p: float = 0.0
    """Sample only from tokens with this share of the largest probability; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred before are less probable."""
    beams: int = 1
    """Number of beams of a beam search; it samples unless the temperature is 0."""
    stop: tuple[str, ...] = ()
    """Strings that end a continuation."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            arguments |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            arguments |= {"min_p": self.min_p} if self.min_p else {}
        arguments |= {"repetition_penalty": self.repetition_penalty} if self.repetition_penalty != 1 else {}
        arguments |= {"num_beams": self.beams} if self.beams > 1 else {}
        return arguments | ({"stop_strings": list(self.stop)} if self.stop else {})


def generate(
    folder: Path,
    prompt: str,
    sampling: Sampling = Sampling(),
    *,
    without: Collection[str] = (),
    domain: str | None = None,
    shares: bool = False,
    device_map: DeviceMap | None = None,
    quantise: str | None = None,
    reporter: Reporter = SILENT,
    decoder: DecoderChoice | None = None,
) -> Generation:
    """Sample a continuation; an ensemble may have a prior for texts of `domain`; `decoder` changes the distribution.

    Raises `UserError` for `shares` of a model without experts, for a domain that the model has no prior for, for too long
    a text, for a `device_map` or `quantise` (see `load_model`) that does not fit, and for a decoder that does not fit.
    """
    (generation,) = generate_batch(
        folder,
        [prompt],
        sampling,
        without=without,
        domain=domain,
        shares=shares,
        device_map=device_map,
        quantise=quantise,
        reporter=reporter,
        decoder=decoder,
    )
    return generation


def generate_batch(
    folder: Path,
    prompts: Sequence[str],
    sampling: Sampling = Sampling(),
    *,
    without: Collection[str] = (),
    domain: str | None = None,
    shares: bool = False,
    device_map: DeviceMap | None = None,
    quantise: str | None = None,
    reporter: Reporter = SILENT,
    decoder: DecoderChoice | None = None,
) -> list[Generation]:
    """Sample a continuation of each prompt, all in one batch; arguments and errors as for `generate`."""
    checked = None if decoder is None else check_decoder(decoder)
    require_intact_models([folder])
    if checked is not None:
        checked.require_for(folder)
    model, tokenizer = load_model(folder, without=without, device_map=device_map, quantise=quantise)
    if shares and not hasattr(model, "responsibilities"):
        raise UserError(
            f"{folder.name} does not mix the experts' predictions per token; request shares from an ensemble"
        )
    if not begin_text(model, domain) and domain is not None:
        raise unknown_name(
            "domain", domain, getattr(model, "text_domains", ()), listed_as=f"{folder.name} has priors for"
        )
    if device_map is None:
        model.to(best_device())
    opened = OpenedDecoder(model) if checked is None else checked.open(model, tokenizer, reporter=reporter)
    prompt_ids = [
        _prompt_tokens(opened.model, tokenizer, prompt, sampling.max_new_tokens)[0].tolist() for prompt in prompts
    ]
    torch.manual_seed(sampling.seed)
    with torch.inference_mode(), threads_for_tokens(weight_bytes(opened.model)):
        continuations = continue_prompts(opened, tokenizer, prompt_ids, sampling, reporter)
        generations = []
        for prompt, continuation in zip(prompt_ids, continuations, strict=True):
            ids = [*prompt, *continuation]
            text_1T = torch.tensor([ids], device=model.device)
            rows = model.responsibilities(text_1T)[0].tolist() if shares and len(ids) > 1 else []
            names = tuple(model.expert_names) if shares else ()
            token_shares = [None, *(dict(zip(names, row, strict=True)) for row in rows)]  # the first is not predicted
            texts = _decode_each(tokenizer, ids)
            tokens = tuple(itertools.starmap(GeneratedToken, itertools.zip_longest(ids, texts, token_shares)))
            generations.append(Generation(tokens[: len(prompt)], tokens[len(prompt) :], names))
    return generations


def continue_prompts(
    opened: OpenedDecoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    reporter: Reporter = SILENT,
) -> list[list[int]]:
    """Return the continuation of each prompt, in tokens, up to its end-of-sequence token or stop string.

    Raises `UserError` for a decoder that chooses among samples where they would all be equal.
    """
    samples = opened.samples
    if samples is not None and (sampling.temperature == 0 or sampling.beams > 1):
        raise UserError("the best of several samples needs a temperature above 0 and no beams, else all are equal")
    count = 1 if samples is None else samples.count
    ids_BT, mask_BT = _left_padded(prompts, _padding(opened.model, tokenizer))
    text_BT = opened.model.generate(
        ids_BT.to(opened.model.device),
        attention_mask=mask_BT.to(opened.model.device),
        # transformers has no streamer for beams
        streamer=_TokenCounter(reporter, sampling.max_new_tokens) if sampling.beams == 1 else None,
        **sampling.arguments(),
        **({"num_return_sequences": count} if count > 1 else {}),
        **({"tokenizer": tokenizer} if sampling.stop else {}),
    )
    ends = _end_tokens(opened.model)
    rows = [_until_end(tokenizer, row, ends, sampling.stop) for row in text_BT[:, ids_BT.shape[1] :].tolist()]
    if samples is None:
        return rows
    chosen = []
    for number, prompt in enumerate(prompts):
        candidates = rows[number * count : (number + 1) * count]
        scores = samples.score(prompt, candidates)
        chosen.append(candidates[max(range(count), key=scores.__getitem__)])
    return chosen


def _left_padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Return prompts that end together, and their mask, (B, T)."""
    longest = max(map(len, prompts))
    ids = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _end_tokens(model: PreTrainedModel) -> list[int]:
    config: Any = model.generation_config
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token that the model has, for places that it does not attend to."""
    tokens = (tokenizer.pad_token_id, *_end_tokens(model))
    return next((int(token) for token in tokens if isinstance(token, int)), 0)


def _until_end(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: Sequence[int], stop: Sequence[str]
) -> list[int]:
    """Return a continuation without the padding behind its end."""
    count = next((number for number, token in enumerate(ids, start=1) if token in ends), len(ids))
    for number in range(1, count + 1) if stop else ():
        text = str(tokenizer.decode(ids[:number], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if any(string in text for string in stop):
            return ids[:number]
    return ids[:count]


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters, shared ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class _TokenCounter:
    """A transformers streamer that reports the number of new tokens."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self._reporter, self._total = reporter, total
        self._count = -1  # the first call passes the prompt

    def put(self, tokens: Tensor) -> None:
        self._count += 1
        self._reporter.progress("writing", self._count, self._total, "tokens")

    def end(self) -> None: ...


def _prompt_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> Tensor:
    """Return the prompt as tokens (1, T); an empty prompt becomes the token that precedes a document."""
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise UserError("the model's tokenizer has no begin-of-sequence token; give a prompt")
        ids = [first]
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    if rows is not None and max(ids) >= rows:
        raise missing_row(tokenizer.convert_ids_to_tokens(max(ids)), max(ids), rows)
    positions, own = getattr(model.config, "max_position_embeddings", None), prompt_tokens_of(model)
    if positions is not None and own + len(ids) + max_new_tokens > positions:
        left = f" that the model's own prompt of {own} leaves" if own else ""
        raise UserError(
            f"the prompt has {len(ids)} tokens; with {max_new_tokens} new tokens it exceeds the model's {positions - own} "
            f"positions{left}; shorten the prompt or request fewer tokens"
        )
    return torch.tensor([ids])


def _decode_each(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text of each token; a character of several tokens is assigned to the last of them."""
    pieces: list[str] = []
    previous_text = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if text.endswith("�") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(previous_text) :])
        previous_text = text
    return pieces
