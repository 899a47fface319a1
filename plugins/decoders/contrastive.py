"""Contrastive decoding: an expert against an amateur (arXiv:2210.15097, arXiv:2309.09117).

E is the expert, A the amateur. Only tokens of the expert's plausible set count: p_E(v) >= alpha max p_E.
`original`: s = log p_E - log p_A; beams sum s. `reasoning`: softmax of (1 + beta) z_E - beta z_A, of logits z.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...core.errors import UserError
from ...core.hooks.evaluation import Decoder, DecoderInputs
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least, check_positive, check_range

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ContrastiveOptions:
    """Options of contrastive decoding."""

    amateur: str = "seed"
    """Model of the same tokenizer whose preferences are subtracted: an artefact or a folder."""
    form: Literal["original", "reasoning"] = "original"
    alpha: float = 0.1
    """Smallest probability of a token, as a share of the largest one; 0 keeps all tokens."""
    beta: float = 0.5
    """Weight of the amateur in the form `reasoning`."""
    temperature: float = 1.0
    """Temperature of the amateur in the form `original`."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0, 1)
        check_at_least("beta", self.beta, 0)
        check_positive("temperature", self.temperature)


def contrast(expert_BTV: Tensor, amateur_BTV: Tensor, options: ContrastiveOptions) -> Tensor:
    """Return the scores of all tokens, (B, T, V), -inf outside of the plausible set."""
    if options.form == "original":
        scores = expert_BTV.log_softmax(-1) - (amateur_BTV / options.temperature).log_softmax(-1)
    else:
        scores = (1 + options.beta) * expert_BTV - options.beta * amateur_BTV
    if options.alpha == 0:
        return scores
    least = expert_BTV.amax(-1, keepdim=True) + math.log(options.alpha)
    return scores.masked_fill(expert_BTV < least, -math.inf)


def have_equal_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    """Return whether two models have the same parameters; stops at the first that differs."""
    pairs = itertools.zip_longest(first.named_parameters(), second.named_parameters())
    return all(
        one is not None
        and other is not None
        and one[0] == other[0]
        and one[1].shape == other[1].shape
        and bool((one[1] == other[1].to(one[1].device)).all())
        for one, other in pairs
    )


def wrap(inputs: DecoderInputs, options: ContrastiveOptions) -> PreTrainedModel:
    """Return the model that generates by the contrast."""
    from ...core.models.decoding.rows import DecodingRow, RowsModel
    from ...core.models.decoding.summed_scores import SummedScores

    amateur = inputs.models[options.amateur]
    if have_equal_weights(inputs.model, amateur):
        raise UserError(
            f"the amateur '{options.amateur}' has the weights of the expert, so that nothing is left; name another amateur"
        )
    sizes = [model.num_parameters() for model in (inputs.model, amateur)]
    if sizes[1] > sizes[0]:
        inputs.reporter.say(
            f"the amateur '{options.amateur}' has {sizes[1]:,} parameters and the expert {sizes[0]:,}; contrastive decoding "
            "expects a weaker amateur"
        )

    def combine(logits: Sequence[Tensor]) -> Tensor:
        expert_BTV, amateur_BTV = logits
        return contrast(expert_BTV, amateur_BTV, options)

    kind = SummedScores if options.form == "original" else RowsModel
    return kind(inputs.model, [DecodingRow(inputs.model), DecodingRow(amateur)], combine)


def unscored(options: ContrastiveOptions) -> str | None:
    """Say why the loss of a text is infinite, unless all tokens are kept."""
    if options.alpha == 0:
        return None
    return (
        f"with alpha {options.alpha:g}, tokens outside of the expert's plausible set have probability 0, so that the loss of a "
        "text is infinite; set alpha=0"
    )


@hookimpl
def decoders() -> list[Decoder]:
    summary = "the tokens that an expert prefers more than a weaker model does"
    return [
        Decoder(
            "contrastive",
            summary,
            wrap,
            options=ContrastiveOptions,
            models=lambda options: [options.amateur],
            unscored=unscored,
        )
    ]
