"""Weights of experts in a merge: uniform, explicit, or from the domain posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import UserError, unknown_name
from ...core.hooks.merging import MergeInputs
from ...core.hooks.text import ValidationText
from ...core.reporting import Reporter
from ..ensemble.prior import fit_prior
from ..recipes.parameters import is_varied


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

    `posterior` is the cached prior of Branch-Train-Merge (arXiv:2208.03306), its best weights for a parameter average.
    Raises `UserError` for weights that are negative, sum to 0, vary between tensors, or belong to unknown experts.
    """
    if wanted == "uniform":
        return {name: 1 / len(experts) for name in experts}
    if wanted == "posterior":
        return fit_prior(MergeInputs(seed, experts, {}, validation=validation, reporter=reporter), "prefix")
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
