"""What a coordinator asks of an owner: an expert of this seed, trained in this way, until then."""

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
from .parts import FileParts

FORMAT = 1
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class RoundOf:
    """One round of a shared model, which an owner's part in it belongs to."""

    model: str
    """What the shared model is called."""
    rounds: str
    """Identifier of all its rounds: what an owner keeps from one to the next is kept under it."""
    number: int
    total: int
    """Rounds that there will be."""
    steps: int
    """Optimiser steps in a round."""

    def __post_init__(self) -> None:
        numbers = (self.number, self.total, self.steps)
        if not all(type(one) is int and 0 <= one < 10**9 for one in numbers) or not is_identifier(
            self.rounds
        ):
            raise UserError("the round of a request makes no sense; ask for it again")
        if not 0 <= self.number < self.total or self.steps < 1:
            raise UserError("the round of a request is none of its rounds; ask for it again")
        check_name(self.model, "a shared model")

    def __str__(self) -> str:
        return f"round {self.number + 1} of {self.total} of '{self.model}'"

    @property
    def is_last(self) -> bool:
        return self.number + 1 == self.total

    @classmethod
    def of_json(cls, content: Any) -> RoundOf:
        """Read what a recipe's `as_json` gives; raises `UserError` for anything else."""
        _check_keys(content, {"model", "rounds", "number", "total", "steps"}, "a round")
        if not isinstance(content["model"], str):
            raise UserError("the round of a request has no name; ask for it again")
        return cls(**content)


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained."""

    trains: str
    """A trainer: `flexolmo`, `all` ..."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the trainer."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the training loop that differ from the defaults: `tokens`, `learning_rate` ..."""
    privacy: Mapping[str, Any] | None = None
    """What differential privacy is asked for, or None."""
    round: RoundOf | None = None
    """Set: what is trained is not an expert, but the shared model for one round."""

    @property
    def digest(self) -> str:
        """Return what tells recipes apart."""
        return hashlib.sha256(canonical(self.as_json())).hexdigest()

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
        """Read what `as_json` gives; raises `UserError` for anything else."""
        optional = {"round"} if isinstance(content, dict) and "round" in content else set()
        _check_keys(content, {"trains", "options", "training", "privacy"} | optional, "a recipe")
        privacy = content["privacy"]
        if (
            not isinstance(content["trains"], str)
            or not isinstance(content["options"], dict)
            or not isinstance(content["training"], dict)
            or not (privacy is None or isinstance(privacy, dict))
        ):
            raise UserError("the recipe of a request makes no sense; ask for it again")
        part = RoundOf.of_json(content["round"]) if "round" in content else None
        return cls(content["trains"], content["options"], content["training"], privacy, part)


@dataclass(frozen=True)
class ExpertRequest:
    """One expert, asked of one owner."""

    id: str
    owner: str
    key: str
    """Fingerprint of the owner's key."""
    seed: str
    """Digest of the seed."""
    seed_files: tuple[FileParts, ...]
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
        """Read what `as_json` gives; raises `UserError` for anything else, since it comes from outside."""
        names = {"format", "id", "owner", "key", "seed", "seed_files", "recipe", "deadline"}
        _check_keys(content, names, "a request")
        if content["format"] != FORMAT:
            raise UserError(
                f"the request has format {content['format']!r}; this version reads format {FORMAT}: let coordinator and owner "
                "use the same version"
            )
        words = [content[name] for name in ("id", "owner", "key", "seed", "deadline")]
        if not all(isinstance(word, str) and len(word) < 200 for word in words) or not is_identifier(
            content["id"]
        ):
            raise UserError("the request makes no sense; ask for it again")
        if not isinstance(content["seed_files"], list):
            raise UserError("the request names no files of a seed; ask for it again")
        try:
            deadline = datetime.fromisoformat(content["deadline"])
        except ValueError:
            raise UserError(f"the deadline {content['deadline']!r} of a request is no time") from None
        if deadline.tzinfo is None:
            raise UserError(f"the deadline {content['deadline']!r} of a request has no time zone")
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
    """Return requests without those for a round of a shared model where a later round was asked for too."""
    latest: dict[str, int] = {}
    for request in requests:
        if (part := request.recipe.round) is not None:
            latest[part.rounds] = max(part.number, latest.get(part.rounds, 0))
    return [
        request
        for request in requests
        if (part := request.recipe.round) is None or part.number == latest[part.rounds]
    ]


def new_identifier() -> str:
    """Return an identifier that nobody guesses."""
    return secrets.token_hex(8)


def is_identifier(text: object) -> bool:
    """Tell whether a text can be an identifier, which becomes part of a path."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{16}", text) is not None


def canonical(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of JSON that are signed and digested: keys sorted, no spaces."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def deadline_in(text: str, now: datetime) -> datetime:
    """Return when `48h`, `30m`, `2d` or `1d 12h` from now is; raises `UserError` for anything else."""
    found = _DURATION.findall(text.lower())
    if not found or _DURATION.sub("", text.lower()).strip():
        raise UserError(f"'{text}' is no time until a deadline; write 30m, 48h, 2d or 1d 12h")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in found)
    if seconds <= 0:
        raise UserError(f"'{text}' is over at once; write 30m, 48h, 2d or 1d 12h")
    if seconds > 10 * 365 * 86400:
        raise UserError(f"'{text}' is more than ten years")
    return now.astimezone(UTC) + timedelta(seconds=seconds)


def _check_keys(content: Any, names: set[str], what: str) -> None:
    if not isinstance(content, dict) or set(content) != names:
        raise UserError(f"that is not {what} of this version; let coordinator and owner use the same version")
