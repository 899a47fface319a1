"""The best of several samples, by their likelihood or by Coder-Reviewer reranking (arXiv:2211.16490).

x is the prompt, y a sample. `likelihood`: log p(y | x). `reviewer`: log p(y | x) + log p(x | y), where the reviewer reads
the sample, `instruction`, and then the prompt.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...core.errors import UserError
from ...core.hooks.evaluation import Decoder, DecoderInputs, SampleChoice
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST_ZLIB_RATIO = 0.25
"""Texts that compress further are repetitions, as in the paper's code."""


@dataclass(frozen=True)
class BestOfOptions:
    """Options of the choice among samples."""

    samples: int = 8
    by: Literal["likelihood", "reviewer"] = "likelihood"
    judge: str = ""
    """Model of the same tokenizer that scores (default: the one that generates)."""
    mean: bool = True
    """Divide log-likelihoods by the number of tokens."""
    instruction: str = "\n"
    """Text between sample and prompt for the reviewer."""

    def __post_init__(self) -> None:
        check_at_least("samples", self.samples, 2)


@dataclass(frozen=True)
class Judge:
    """Scores samples of a prompt."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: BestOfOptions

    def score(self, prompt: Sequence[int], samples: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each sample, -inf for empty and degenerate ones."""
        texts = [self._text(sample) for sample in samples]
        usable = [number for number, text in enumerate(texts) if not is_degenerate(text)]
        scores = [float("-inf")] * len(samples)
        terms = [self._log_probs([(prompt, samples[number]) for number in usable])]
        if self.options.by == "reviewer":
            # the prompt's own begin of text comes before the sample
            begin = self._begin(prompt)
            pairs = [
                ([*begin, *self._tokens(texts[number] + self.options.instruction)], prompt[len(begin) :])
                for number in usable
            ]
            terms.append(self._log_probs(pairs))
        for number, values in zip(usable, zip(*terms, strict=True), strict=True):
            scores[number] = sum(values)
        return scores

    def _log_probs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        from ...core.models.decoding.wrapped import positions_of
        from ...core.models.scoring import continuation_log_probs

        longest, positions = (
            max((len(prefix) + len(target) for prefix, target in pairs), default=0),
            positions_of(self.model),
        )
        if longest > positions:
            raise UserError(
                f"the judge reads {longest} tokens of prompt and sample and has {positions} positions; request fewer tokens"
            )
        totals = continuation_log_probs(self.model, pairs)
        if not self.options.mean:
            return totals
        return [total / max(len(target), 1) for total, (_, target) in zip(totals, pairs, strict=True)]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _begin(self, prompt: Sequence[int]) -> list[int]:
        """Return the special tokens that a prompt begins with, but not the whole prompt."""
        special = set(self.tokenizer.all_special_ids)
        count = next((number for number, token in enumerate(prompt) if token not in special), len(prompt) - 1)
        return list(prompt[:count])


def is_degenerate(text: str) -> bool:
    """Return whether a sample is empty or little but repetition."""
    content = text.strip().encode("utf-8", "surrogatepass")
    return not content or len(zlib.compress(content)) / len(content) <= LEAST_ZLIB_RATIO


def choose(inputs: DecoderInputs, options: BestOfOptions) -> SampleChoice:
    """Return the choice by the judge, which is the model itself if none is named."""
    model = inputs.models[options.judge] if options.judge else inputs.model
    return SampleChoice(options.samples, Judge(model, inputs.tokenizer, options).score)


@hookimpl
def decoders() -> list[Decoder]:
    summary = "the best of several samples, by likelihood or by Coder-Reviewer reranking"
    return [
        Decoder(
            "best_of",
            summary,
            choose=choose,
            options=BestOfOptions,
            models=lambda options: [options.judge] if options.judge else [],
        )
    ]
