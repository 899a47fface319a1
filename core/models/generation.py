"""Text generation with each expert's responsibility for each token. Shapes: B = 1, T = tokens, K = experts."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError, unknown_name
from ..process.compute import best_device, threads_for_tokens
from ..reporting import SILENT, Reporter
from ..text.tokenizer import missing_row
from .loading import load_model, require_intact_models
from .placement import DeviceMap
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


def generate(
    folder: Path,
    prompt: str,
    sampling: Sampling = Sampling(),
    *,
    without: Collection[str] = (),
    domain: str | None = None,
    shares: bool = False,
    device_map: DeviceMap | None = None,
    reporter: Reporter = SILENT,
) -> Generation:
    """Sample a continuation; an ensemble may have a prior for texts of `domain`.

    Raises `UserError` for `shares` of a model without experts, for a domain that the model has no prior for, for too long
    a text, and for a `device_map` (see `load_model`) that does not fit.
    """
    require_intact_models([folder])
    model, tokenizer = load_model(folder, without=without, device_map=device_map)
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
    prompt_1T = _prompt_tokens(model, tokenizer, prompt, sampling.max_new_tokens).to(model.device)
    torch.manual_seed(sampling.seed)
    temperature = sampling.temperature
    options = {"temperature": temperature, "top_p": sampling.top_p, "top_k": 0} if temperature > 0 else {}
    with torch.inference_mode(), threads_for_tokens(weight_bytes(model)):
        text_1T = model.generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=temperature > 0,
            streamer=_TokenCounter(reporter, sampling.max_new_tokens),
            **options,
        )
        rows = model.responsibilities(text_1T)[0].tolist() if shares and text_1T.shape[1] > 1 else []
    ids = text_1T[0].tolist()
    names = tuple(model.expert_names) if shares else ()
    token_shares = [None, *(dict(zip(names, row, strict=True)) for row in rows)]  # the first token is not predicted
    texts = _decode_each(tokenizer, ids)
    tokens = tuple(itertools.starmap(GeneratedToken, itertools.zip_longest(ids, texts, token_shares)))
    prompt_length = prompt_1T.shape[1]
    return Generation(tokens[:prompt_length], tokens[prompt_length:], names)


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
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise UserError(
            f"the prompt has {len(ids)} tokens; with {max_new_tokens} new tokens it exceeds the model's {positions} "
            "positions; shorten the prompt or request fewer tokens"
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
