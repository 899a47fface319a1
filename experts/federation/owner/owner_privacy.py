"""Privacy settings of a request: the stricter of the coordinator's and the owner's demands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....core.config.settings import DpConfig, validate_settings
from ....core.errors import UserError
from ....core.manifests.run import RUN_FILE, read_run
from ..protocol.requests import ExpertRequest

LABEL = "the differential privacy (--dp)"


def checked_privacy(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """Return privacy settings unchanged; raises `UserError` if they are invalid."""
    validate_settings(DpConfig, dict(privacy), LABEL)
    return dict(privacy)


def privacy_of(request: ExpertRequest, demanded: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the privacy settings for a request: the coordinator's, the owner's, or the smaller budget of both.

    None means without differential privacy. Raises `UserError` if the owner demands noise for a round of a shared model.
    """
    requested = request.recipe.privacy
    if demanded is None:
        return dict(requested) if requested is not None else None
    if request.recipe.round is not None:
        raise UserError(
            f"your settings demand differential privacy, and {request.recipe.round} is trained without; it is refused"
        )
    if requested is None:
        return dict(demanded)
    return {**requested, **demanded, **{name: min(requested[name], demanded[name]) for name in ("epsilon", "delta")}}


def is_private_enough(run_folder: Path, privacy: Mapping[str, Any] | None) -> bool:
    """Return whether a run's settings keep to a privacy budget; true if there is no budget or no run."""
    if privacy is None or not (run_folder / RUN_FILE).is_file():
        return True
    dp = read_run(run_folder).dp
    return dp is not None and dp.noise == "secret" and dp.epsilon <= privacy["epsilon"] and dp.delta <= privacy["delta"]
