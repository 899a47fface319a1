"""Scores of the choices of a question under four rules. x is the question, y a choice; log-probabilities in nats.

- `direct`: log p(y | x), summed over tokens.
- `length`: the same divided by the UTF-8 bytes of y, so that it does not depend on the tokenizer.
- `unconditional`: log p(y | x) - log p(y | neutral prefix), without what makes y likely anywhere (arXiv:2005.14165, section 2.4).
- `channel`: log p(x | y), the noisy channel with equal prior probabilities of the choices (arXiv:2108.04106, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....core.errors import UserError
from ....core.models.scoring import continuation_log_probs
from ....core.reporting import SILENT, Reporter
from ....core.text.tokenizer import TextEncoder
from .opening import OpenedModel
from .questions import Question, Template
from .token_borders import Pair, split_texts

RULES = ("direct", "length", "unconditional", "channel")
BATCH_TOKENS = 4096
BATCH_LOGITS = 1 << 26  # limits the logits of a batch to 256 MiB of float32


@dataclass(frozen=True)
class QuestionPairs:
    """Prefixes and targets of one question in tokens, one of each kind for every choice."""

    direct: Sequence[Pair]
    neutral: Sequence[Pair]
    channel: Sequence[Pair]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prefix with its target."""
        return max(len(prefix) + len(target) for prefix, target in (*self.direct, *self.neutral, *self.channel))


def question_pairs(
    encoder: TextEncoder, template: Template, question: Question, shots: Sequence[Question] = ()
) -> QuestionPairs:
    """Return what is scored for one question."""
    prompt = template.direct(question, shots)
    answers = [f" {choice}" for choice in question.choices]
    count = len(answers)
    channel = [template.channel(question, choice, shots) for choice in question.choices]
    # without a label the neutral prefix is the begin of a text, where no blank comes before a choice
    alone = answers if template.neutral else list(question.choices)
    return QuestionPairs(
        split_texts(encoder, [prompt] * count, answers),
        split_texts(encoder, [template.neutral] * count, alone),
        split_texts(encoder, [prefix for prefix, _ in channel], [target for _, target in channel]),
    )


def score_questions(
    opened: OpenedModel, questions: Sequence[Question], pairs: Sequence[QuestionPairs], reporter: Reporter = SILENT
) -> list[dict[str, list[float]]]:
    """Return rule -> score of each choice, for each question; raises `UserError` for a model that gives NaN.

    Pairs are scored in batches of similar length, equal ones once.
    """
    for question, own in zip(questions, pairs, strict=True):
        opened.require_positions(own.longest, question.where, "--shots")
    log_probs = score_pairs(
        opened, [pair for own in pairs for pair in (*own.direct, *own.neutral, *own.channel)], reporter
    )
    scores = []
    for question, own in zip(questions, pairs, strict=True):
        direct, neutral, channel = (
            [log_probs[_key(pair)] for pair in kind] for kind in (own.direct, own.neutral, own.channel)
        )
        scores.append(rule_scores(question.choices, direct, neutral, channel))
    return scores


def rule_scores(
    choices: Sequence[str], direct: Sequence[float], neutral: Sequence[float], channel: Sequence[float]
) -> dict[str, list[float]]:
    """Return the scores of the choices under each rule, from log p(y | x), log p(y | neutral) and log p(x | y)."""
    return {
        "direct": list(direct),
        "length": [value / len(choice.encode()) for value, choice in zip(direct, choices, strict=True)],
        # a choice that is impossible anyway stays impossible
        "unconditional": [
            value if math.isinf(value) else value - other for value, other in zip(direct, neutral, strict=True)
        ],
        "channel": list(channel),
    }


def credit(scores: Sequence[float], answer: int) -> float:
    """Return 1 if the right choice has the highest score alone, a share if others have it too, else 0."""
    best = max(scores)
    return 1 / scores.count(best) if scores[answer] == best else 0.0


def score_pairs(
    opened: OpenedModel, pairs: Sequence[Pair], reporter: Reporter = SILENT
) -> Mapping[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """Return log p(target | prefix) of each different pair; raises `UserError` for a model that gives NaN."""
    ordered = sorted({_key(pair) for pair in pairs}, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
    vocabulary = int(opened.model.config.get_text_config().vocab_size)
    batch_tokens = min(BATCH_TOKENS, BATCH_LOGITS // vocabulary)
    results: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    while len(results) < len(ordered):
        begin = len(results)
        size = 1
        # padded to the longest, which is the last
        while begin + size < len(ordered) and (size + 1) * sum(map(len, ordered[begin + size])) <= batch_tokens:
            size += 1
        if opened.learns_from_text:
            size = 1
            opened.forget()
        batch = ordered[begin : begin + size]
        values = continuation_log_probs(opened.model, batch, batch_size=size)
        if any(map(math.isnan, values)):
            raise UserError(f"{opened.name} gives NaN as a probability; its weights are damaged or diverged")
        results.update(zip(batch, values, strict=True))
        reporter.progress(f"scoring {opened.name}", len(results), len(ordered), "texts")
    return results


def _key(pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(pair[0]), tuple(pair[1])
