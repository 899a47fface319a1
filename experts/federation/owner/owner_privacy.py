"""The privacy that an owner insists on, beside what the coordinator asks for: the stricter of the two is kept to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....core.config.settings import DpConfig, checked
from ....core.errors import UserError
from ...runs.specification import RUN_FILE, read_run
from ..protocol.requests import ExpertRequest

WHAT = "the differential privacy (--dp)"


def checked_privacy(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is wanted as it stands in recipes and settings; raises `UserError` for what no run could keep to."""
    checked(DpConfig, dict(wanted), WHAT)
    return dict(wanted)


def privacy_of(request: ExpertRequest, own: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return how private a request's training has to be: as asked, as the owner insists, or the lesser budget of both.

    Raises `UserError` for a round of a shared model where the owner insists on noise.
    """
    asked = request.recipe.privacy
    if own is None:
        return dict(asked) if asked is not None else None
    if request.recipe.round is not None:
        raise UserError(
            f"you insist on differential privacy, and {request.recipe.round} is trained without; it is not carried out"
        )
    if asked is None:
        return dict(own)
    return {**asked, **own, **{name: min(asked[name], own[name]) for name in ("epsilon", "delta")}}


def is_private_enough(run_folder: Path, wanted: Mapping[str, Any] | None) -> bool:
    """Tell whether a run that was begun spends no more than is wanted; one that was not begun does."""
    if wanted is None or not (run_folder / RUN_FILE).is_file():
        return True
    found = read_run(run_folder).dp
    return (
        found is not None
        and found.noise == "secret"
        and found.epsilon <= wanted["epsilon"]
        and found.delta <= wanted["delta"]
    )
