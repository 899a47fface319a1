"""DExperts: experts of a seed push the predictions of a model towards them, or away from them (arXiv:2105.03023).

z = z_model + sum_i a_i (z_i - z_seed), of logits z. With a 1 for an expert and -1 for an anti-expert, the seed cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...core.hooks.evaluation import Decoder, DecoderInputs
from ...core.hooks.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class AgainstSeedOptions:
    """Options of DExperts."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of each expert, such as `{law: 0.5, spam: -0.5}`; negative: away from it."""
    seed: str = "seed"
    """Model that the experts are compared with."""

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights names no expert; set weights={NAME: WEIGHT}")
        if wrong := [name for name, weight in self.weights.items() if not math.isfinite(weight)]:
            raise ValueError(f"the weight of {wrong[0]} is not a finite number")

    @property
    def seed_weight(self) -> float:
        """Weight of the seed's logits."""
        return -math.fsum(self.weights.values())


def models(options: AgainstSeedOptions) -> list[str]:
    """Return the names of the experts, and the seed's unless it cancels."""
    return [*options.weights, *([options.seed] if options.seed_weight and options.seed not in options.weights else [])]


def wrap(inputs: DecoderInputs, options: AgainstSeedOptions) -> PreTrainedModel:
    """Return the model with the weighted sum of logits."""
    from ...core.models.decoding.rows import DecodingRow, RowsModel

    weights = dict(options.weights)
    if options.seed_weight:
        weights[options.seed] = weights.get(options.seed, 0.0) + options.seed_weight
    others = [DecodingRow(inputs.models[name], weight) for name, weight in weights.items()]
    return RowsModel(inputs.model, [DecodingRow(inputs.model), *others])


@hookimpl
def decoders() -> list[Decoder]:
    summary = "a model pushed towards experts of a seed, or away from them (DExperts)"
    return [Decoder("experts_against_seed", summary, wrap, options=AgainstSeedOptions, models=models)]
