"""Privacy settings of a request: the stricter of the coordinator's and the owner's demands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....core.config.settings import DpConfig, validate_settings
from ....core.errors import UserError
from ..protocol.requests import ExpertRequest


def checked_privacy(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """Return privacy settings unchanged; raises `UserError` if they are invalid."""
    validate_settings(DpConfig, dict(privacy), "the differential privacy (--dp)")
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
