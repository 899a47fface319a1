"""Weights of experts in a merge: uniform, explicit, or from the domain posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import UserError, unknown_name
from ...core.hooks.merging import MergeInputs
from ...core.hooks.text import ValidationText
from ...core.reporting import Reporter
from ..ensemble.prior import fit_priors, mean_prior
from ..recipes.parameters import is_varied

LEAST_DIFFERENCE = 0.05
"""Total variation from uniform weights below which weights carry no information."""


def posterior_weights(
    seed: Path,
    experts: Mapping[str, Path],
    validation: Callable[[], Sequence[ValidationText]],
    reporter: Reporter,
) -> dict[str, float]:
    """Return the mean of the cached priors of the validation text's domains, with the evidence of the released code."""
    return mean_prior(
        fit_priors(MergeInputs(seed, experts, {}, validation=validation, reporter=reporter), "last_token")
    )


def check_weights(wanted: str | Mapping[str, Any], experts: Mapping[str, Path]) -> None:
    """Raise `UserError` for weights of unknown experts and for experts without a weight."""
    if isinstance(wanted, str):
        return
    for name in wanted:
        if name not in experts:
            raise unknown_name("expert", name, experts, listed_as="this merge takes")
    require_all_weights([name for name in experts if name not in wanted])


def require_all_weights(missing: Sequence[str]) -> None:
    """Raise `UserError` if there are experts without a weight."""
    if missing:
        raise UserError(f"no weight is given for {', '.join(missing)}; give a weight for every expert of the merge")


def resolve_weights(
    wanted: str | Mapping[str, Any],
    seed: Path,
    experts: Mapping[str, Path],
    validation: Callable[[], Sequence[ValidationText]],
    reporter: Reporter,
) -> dict[str, float]:
    """Return one weight per expert, for all tensors; the weights sum to 1.

    `posterior` is the cached prior of Branch-Train-Merge (arXiv:2208.03306), its best weights for a parameter average
    that is to be used on the domain of the validation text. Raises `UserError` for weights that are negative, sum to 0,
    vary between tensors, belong to unknown experts, or should come from text of
    several domains that together favours no expert.
    """
    if wanted == "uniform":
        return {name: 1 / len(experts) for name in experts}
    if wanted == "posterior":
        weights = posterior_weights(seed, experts, validation, reporter)
        domains = [text.domain for text in validation()]
        distance = sum(abs(weight - 1 / len(experts)) for weight in weights.values()) / 2
        if len(domains) > 1 and len(experts) > 1 and distance < LEAST_DIFFERENCE:
            raise UserError(
                f"the posterior's weights are uniform, since the text that they are fitted on ({', '.join(domains)}) favours "
                "no expert; name the domain that the model is for with fit_on (--fit-on), or use weights: uniform"
            )
        return weights
    assert isinstance(wanted, Mapping), wanted
    check_weights(wanted, experts)
    for name, weight in wanted.items():
        if is_varied(weight):
            raise UserError(
                f"the weight of '{name}' varies between tensors; this method needs one weight for the whole model"
            )
        if weight < 0:
            raise UserError(f"the weight of '{name}' is {weight}; weights must be 0 or more")
    total = sum(wanted.values())
    if total <= 0:
        raise UserError("the weights sum to 0; give at least one positive weight")
    return {name: wanted[name] / total for name in experts}
