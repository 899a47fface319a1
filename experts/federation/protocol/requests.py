"""Requests: a coordinator asks an owner for an expert of a seed, trained by a recipe, before a deadline."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from ....core.artefacts.layout import check_name
from ....core.errors import UserError
from .fields import SAME_VERSION, check_fields
from .parts import FileParts

FORMAT = 1
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class RoundOf:
    """The round of a shared model that a request belongs to."""

    model: str
    """Name of the shared model."""
    rounds: str
    """Identifier of the sequence of rounds; an owner's state between rounds is stored under it."""
    number: int
    """Number of this round, from 0."""
    total: int
    """Number of rounds planned."""
    steps: int
    """Optimiser steps per round."""

    def __post_init__(self) -> None:
        numbers = (self.number, self.total, self.steps)
        is_valid = all(type(number) is int and 0 <= number < 10**9 for number in numbers)
        if not is_valid or not is_identifier(self.rounds):
            raise UserError("a field of the request's round is invalid; ask the coordinator for a new request")
        if not 0 <= self.number < self.total or self.steps < 1:
            raise UserError("the request's round number is out of range; ask the coordinator for a new request")
        check_name(self.model, "a shared model")

    def __str__(self) -> str:
        return f"round {self.number + 1} of {self.total} of '{self.model}'"

    @property
    def is_last(self) -> bool:
        return self.number + 1 == self.total

    @classmethod
    def of_json(cls, content: Any) -> RoundOf:
        """Read a round from a recipe's `as_json`; raises `UserError` for anything else."""
        check_fields(content, "the round of a request", ("model", "rounds", "number", "total", "steps"))
        if not isinstance(content["model"], str):
            raise UserError("the shared model's name in the request is not text; ask the coordinator for a new request")
        return cls(**content)


@dataclass(frozen=True)
class Recipe:
    """Training recipe of an expert: trainer, options, settings and privacy."""

    trains: str
    """Name of the trainer: `flexolmo`, `all` ..."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the trainer."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Training-loop settings that differ from the defaults: `tokens`, `learning_rate` ..."""
    privacy: Mapping[str, Any] | None = None
    """Differential privacy settings; None to train without."""
    round: RoundOf | None = None
    """Round of a shared model that the request trains; None for an expert."""

    @property
    def digest(self) -> str:
        """Digest of the recipe's canonical JSON (sha256)."""
        return hashlib.sha256(canonical_json(self.as_json())).hexdigest()

    def as_json(self) -> dict[str, Any]:
        return {
            "trains": self.trains,
            "options": dict(self.options),
            "training": dict(self.training),
            "privacy": dict(self.privacy) if self.privacy is not None else None,
            **({"round": asdict(self.round)} if self.round is not None else {}),
        }

    @classmethod
    def of_json(cls, content: Any) -> Recipe:
        """Read the result of `as_json`; raises `UserError` for anything else."""
        check_fields(content, "the recipe", ("trains", "options", "training", "privacy"), ("round",))
        privacy = content["privacy"]
        if (
            not isinstance(content["trains"], str)
            or not isinstance(content["options"], dict)
            or not isinstance(content["training"], dict)
            or not (privacy is None or isinstance(privacy, dict))
        ):
            raise UserError("a field of the recipe has the wrong type; ask the coordinator for a new request")
        round_ = RoundOf.of_json(content["round"]) if "round" in content else None
        return cls(content["trains"], content["options"], content["training"], privacy, round_)


@dataclass(frozen=True)
class ExpertRequest:
    """A request for one expert from one owner."""

    id: str
    """16 hexadecimal digits."""
    owner: str
    key: str
    """Fingerprint of the owner's key."""
    seed: str
    """Digest of the seed."""
    seed_files: tuple[FileParts, ...]
    """Files of the seed that the owner downloads."""
    recipe: Recipe
    deadline: datetime
    """UTC."""

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "id": self.id,
            "owner": self.owner,
            "key": self.key,
            "seed": self.seed,
            "seed_files": [file.as_json() for file in self.seed_files],
            "recipe": self.recipe.as_json(),
            "deadline": self.deadline.astimezone(UTC).isoformat(timespec="seconds"),
        }

    @classmethod
    def of_json(cls, content: Any) -> ExpertRequest:
        """Read the result of `as_json`; raises `UserError` for anything else, since it comes from outside."""
        names = {"format", "id", "owner", "key", "seed", "seed_files", "recipe", "deadline"}
        check_fields(content, "the request", names)
        if content["format"] != FORMAT:
            raise UserError(
                f"the request has format {content['format']!r}; this version reads format {FORMAT}: {SAME_VERSION}"
            )
        words = [content[name] for name in ("id", "owner", "key", "seed", "deadline")]
        are_texts = all(isinstance(word, str) and len(word) < 200 for word in words)
        if not are_texts or not is_identifier(content["id"]):
            raise UserError("a field of the request is invalid; ask the coordinator for a new one")
        if not isinstance(content["seed_files"], list):
            raise UserError("the request's seed_files is not a list; ask the coordinator for a new request")
        try:
            deadline = datetime.fromisoformat(content["deadline"])
        except ValueError:
            raise UserError(f"the deadline {content['deadline']!r} of the request is not an ISO 8601 time") from None
        if deadline.tzinfo is None:
            raise UserError(f"the deadline {content['deadline']!r} of the request has no time zone")
        return cls(
            content["id"],
            content["owner"],
            content["key"],
            content["seed"],
            tuple(FileParts.of_json(file) for file in content["seed_files"]),
            Recipe.of_json(content["recipe"]),
            deadline,
        )


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
