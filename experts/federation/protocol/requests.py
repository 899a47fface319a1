"""Requests for an expert of a seed, trained by a recipe before a deadline, and the progress of that training."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, FailFast, Field

from ....core.config.settings import DpConfig, validate_settings
from ....core.errors import UserError
from .fields import Count, Digest, Fingerprint, Identifier, Message, Name, Settings
from .parts import FileParts

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

ProgressState = Literal["waiting", "training", "ready", "failed"]
FailureCode = Literal["", "SEED", "DATA", "TRAINING", "PRIVACY", "DISK", "MEMORY", "POLICY", "DECLINED", "STOPPED"]
Amount = Annotated[float, Field(ge=0, lt=1e15, allow_inf_nan=False)]


def _valid_deadline(deadline: datetime) -> datetime:
    if not 2000 <= deadline.year <= 2200:  # others leave the range of dates in another time zone or a day later
        raise ValueError(f"a deadline in the year {deadline.year}")
    return deadline


Deadline = Annotated[AwareDatetime, AfterValidator(_valid_deadline)]


@dataclass(frozen=True)
class RoundOf(Message):
    """The round of a shared model that a request belongs to."""

    LABEL = "the round of a request"

    model: Name
    """Name of the shared model."""
    rounds: Identifier
    """Identifier of the sequence of rounds; an owner's state between rounds is stored under it."""
    number: Annotated[int, Field(ge=0, lt=10**9)]
    """Number of this round, from 0."""
    total: Annotated[int, Field(lt=10**9)]
    """Number of rounds planned."""
    steps: Annotated[int, Field(ge=1, lt=10**9)]
    """Optimiser steps per round."""

    def __post_init__(self) -> None:
        if not self.number < self.total:
            raise UserError("the request's round number is out of range; ask the coordinator for a new request")

    def __str__(self) -> str:
        return f"round {self.number + 1} of {self.total} of '{self.model}'"

    @property
    def is_last(self) -> bool:
        return self.number + 1 == self.total


NOT_ASKED = ("stages", "annealing")
"""Training settings that cannot be asked of owners: recipes hold plain values, and owners train on their own text alone."""


def require_askable(training: Mapping[str, Any]) -> None:
    """Raise `UserError` for training settings that cannot be asked of owners."""
    for name in NOT_ASKED:
        if training.get(name):
            raise UserError(f"training.{name} cannot be asked of owners; leave it out")


@dataclass(frozen=True)
class Recipe(Message):
    """Training recipe of an expert: trainer, options, settings and privacy."""

    LABEL = "the recipe"
    OPTIONAL = frozenset({"round"})

    trains: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.*?,\[\]! -]{1,300}$")]
    """Name of the trainer, `flexolmo`, `all` ..., or a pattern of tensor names."""
    options: Settings = field(default_factory=dict)
    """Options of the trainer."""
    training: Settings = field(default_factory=dict)
    """Training-loop settings that differ from the defaults: `tokens`, `learning_rate` ..."""
    privacy: Settings | None = None
    """Differential privacy settings; None to train without."""
    round: Annotated[RoundOf, BeforeValidator(RoundOf.of_json)] | None = None
    """Round of a shared model that the request trains; None for an expert."""

    def __post_init__(self) -> None:
        require_askable(self.training)
        if self.privacy is not None:
            validate_settings(DpConfig, dict(self.privacy), "the differential privacy of the recipe")

    @property
    def digest(self) -> str:
        """Digest of the recipe's canonical JSON (sha256)."""
        return hashlib.sha256(canonical_json(self.as_json())).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """Return the recipe as JSON content, without the field `round` for an expert."""
        content = super().as_json()
        if self.round is None:
            del content["round"]
        return content


@dataclass(frozen=True)
class ExpertRequest(Message):
    """A request for one expert from one owner."""

    LABEL = "the request"
    FORMAT = 1
    OPTIONAL = frozenset({"priority"})

    id: Identifier
    owner: Name
    key: Fingerprint
    """Of the owner's key."""
    seed: Digest
    seed_files: Annotated[
        tuple[Annotated[FileParts, BeforeValidator(FileParts.of_json)], ...],
        Field(min_length=1, max_length=1000),
        FailFast(),
    ]
    """Files of the seed that the owner downloads."""
    recipe: Annotated[Recipe, BeforeValidator(Recipe.of_json)]
    deadline: Deadline
    """UTC."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Owners train for requests of higher priority first, and of equal priority for that with the earlier deadline."""

    def __post_init__(self) -> None:
        require_distinct(self.seed_files, "the seed")

    def as_json(self) -> dict[str, Any]:
        deadline = self.deadline.astimezone(UTC).isoformat(timespec="seconds")
        return {**super().as_json(), "recipe": self.recipe.as_json(), "deadline": deadline}

    @property
    def turn(self) -> tuple[int, datetime, str]:
        """Place in the order in which an owner trains for its requests."""
        return -self.priority, self.deadline, self.id


@dataclass(frozen=True)
class Progress(Message):
    """Progress of one training run."""

    LABEL = "a progress message"
    OPTIONAL = frozenset({"step", "steps", "loss", "seconds_left", "code"})

    state: ProgressState
    step: Count = 0
    """Optimiser steps done."""
    steps: Count = 0
    """Optimiser steps in total; 0 while unknown."""
    loss: Amount | None = None
    """Loss at the last logged step, nats per token, to two decimals; None if unknown or withheld."""
    seconds_left: Amount | None = None
    """Estimated seconds until the end; None if unknown."""
    code: FailureCode = ""
    """Phase or cause of a failure; empty without one."""


def require_distinct(files: Sequence[FileParts], what: str) -> None:
    """Raise `UserError` if two files have one name, also on a file system that ignores case."""
    if len({file.name.lower() for file in files}) != len(files):
        raise UserError(f"the files of {what} have a name twice; they are refused")


def without_superseded(requests: Sequence[ExpertRequest]) -> list[ExpertRequest]:
    """Return the requests without those for a round of a shared model that a later round replaces."""
    latest: dict[str, int] = {}
    for request in requests:
        if (part := request.recipe.round) is not None:
            latest[part.rounds] = max(part.number, latest.get(part.rounds, 0))
    return [
        request for request in requests if (part := request.recipe.round) is None or part.number == latest[part.rounds]
    ]


def new_identifier() -> str:
    """Return a random identifier."""
    return secrets.token_hex(8)


def is_identifier(text: object) -> bool:
    """Return whether a text has the form of an identifier, which becomes part of a path."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{16}", text) is not None


def canonical_json(content: Mapping[str, Any]) -> bytes:
    """Return canonical JSON for signatures and digests: sorted keys, no spaces, UTF-8."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def deadline_in(text: str, now: datetime) -> datetime:
    """Return the time that is `48h`, `30m`, `2d` or `1d 12h` after `now`; raises `UserError` for other texts."""
    durations = _DURATION.findall(text.lower())
    if not durations or _DURATION.sub("", text.lower()).strip():
        raise UserError(f"'{text}' is not a duration; write 30m, 48h, 2d or 1d 12h")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in durations)
    if seconds <= 0:
        raise UserError(f"'{text}' is not longer than 0 seconds; write 30m, 48h, 2d or 1d 12h")
    if seconds > 10 * 365 * 86400:
        raise UserError(f"'{text}' is more than ten years")
    return now.astimezone(UTC) + timedelta(seconds=seconds)
