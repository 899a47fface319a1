"""Acceptance of deliveries: every check that needs none of the owner's text.

Invalid content of any kind leads to a refusal, never to an exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ....core.config.settings import DpConfig, validate_settings
from ....core.manifests.manifest import Manifest, read_manifest
from ...runs.trainable import makes_adapter
from ..protocol.delivery import SignedStatement
from ..protocol.keys import PublicKey
from ..protocol.requests import ExpertRequest
from .delivered_files import check_announced_files, checked_manifest
from .delivered_tensors import check_adapted, check_side_documents, check_side_files, check_tensors, side_files
from .refusal import Refusal, RefusalCode, Refused

MAX_LOSS_RATIO = 2.0
"""Largest loss on public text, as a multiple of the seed's."""


@dataclass(frozen=True)
class HeldOut:
    """Losses of seed and expert on the coordinator's public text, in the same unit."""

    seed: float
    expert: float


Measure = Callable[[Path, Path], HeldOut | None]
"""Scores the folders of a seed and an expert; None without public text."""


def refusal_of_statement(signed: SignedStatement, request: ExpertRequest, key: PublicKey) -> Refusal | None:
    """Judge a statement before any file is sent; return the refusal or None."""
    statement = signed.statement
    if not key.verify(statement.signed_bytes, signed.signature):
        return Refusal(RefusalCode.SIGNATURE)
    expected = (request.id, request.owner, request.seed, request.recipe.digest)
    if (statement.request, statement.owner, statement.seed, statement.recipe) != expected:
        return Refusal(RefusalCode.SOMEONE_ELSES)
    try:
        check_announced_files(statement, request)
    except Refused as refused:
        return refused.refusal
    return None


def examine_expert(
    folder: Path,
    signed: SignedStatement,
    request: ExpertRequest,
    seed: Path,
    held_out: Callable[[], HeldOut | None],
) -> HeldOut | None:
    """Check an expert with all its files and return what `held_out` measures, which is called after all other checks.

    Raises `Refused`.
    """
    side = side_files(request.recipe, seed)
    manifest = checked_manifest(folder, signed, request, read_manifest(seed), side)
    _check_privacy(manifest, request)
    check_side_files(folder, side)
    check_side_documents(folder, request.recipe, seed)
    if makes_adapter(request.recipe.trains):
        check_adapted(folder, seed)
    else:
        check_tensors(folder, request.recipe, seed)
    losses = held_out()
    if losses is not None and not losses.expert <= MAX_LOSS_RATIO * losses.seed:  # true for NaN as well
        loss = "the expert cannot be scored" if math.isnan(losses.expert) else f"{losses.expert:.3f}"
        raise Refused(RefusalCode.HELD_OUT, f"{loss}; the seed has {losses.seed:.3f}")
    return losses


def _check_privacy(manifest: Manifest, request: ExpertRequest) -> None:
    if request.recipe.privacy is None:
        return
    requested = validate_settings(DpConfig, request.recipe.privacy, "the differential privacy of the request")
    spent = manifest.data.privacy
    is_private_enough = (
        spent is not None
        and spent.epsilon is not None
        and spent.epsilon <= requested.epsilon
        and spent.delta <= requested.delta
    )
    if not is_private_enough:
        raise Refused(RefusalCode.PRIVACY)
