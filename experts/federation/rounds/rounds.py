"""Synchronous rounds of a shared model on disk: deliveries, closing and averaging. Safe to kill at any point.

Each round has a folder, such as `round-00000`, with the weights that owners start from. Deliveries appear atomically. Closing a
round first records which owners count, then creates the next round's folder atomically. A process that resumes after a kill
therefore averages the same weights to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from ....core.artefacts.digests import digest_of_tensors
from ....core.artefacts.files import exclusive, link_or_copy, new_folder, read_json, remove_tree, write_json
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint
from ....core.errors import UserError
from ..judging.acceptance import Refusal, RefusalCode
from .averaging import (
    Contribution,
    ExaminedWeights,
    average_round,
    examine_weights,
    outer_recipe,
    owner_shares,
)
from .round_plan import Delivery, RoundPlan, RoundReport, read_plan, write_plan

ROUND_FILE, CLOSING_FILE, OUTER_FILE = "round.json", "closing.json", "outer.safetensors"
DELIVERY_FILE = "delivery.json"
KEPT = 2
"""Rounds whose weights are kept: the open one and its predecessor."""

RoundState = Literal["waiting", "ready", "short"]


class Rounds:
    """The rounds of one shared model, in a folder; every call reads the disk, so that several processes agree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plan, self.start = read_plan(root)  # `start` is the digest of round 0's weights
        self.recipe = outer_recipe(self.plan.recipe)

    @classmethod
    def begin(cls, root: Path, start: Path, plan: RoundPlan, now: datetime) -> Rounds:
        """Open round 0 with the weights of a safetensors file, or resume rounds with the same plan and weights.

        Raises `UserError` if the folder holds other rounds.
        """
        digest = digest_of_tensors(Checkpoint([start]).digests())
        if root.exists():
            rounds = cls(root)
            if rounds.plan != plan or rounds.start != digest:
                raise UserError(f"{root} holds rounds of another plan or model; choose another folder, or remove it")
            return rounds
        with new_folder(root, what="rounds") as partial:
            write_plan(partial, plan, digest)
            first = partial / _name(0)
            first.mkdir()
            link_or_copy(start, first / SINGLE_FILE)
            _write_round(first, 0, digest, now + timedelta(seconds=plan.round_seconds), {})
        return cls(root)

    # --- status ---

    @property
    def number(self) -> int:
        """Number of the open round, which equals the number of closed rounds."""
        return max(int(path.name.removeprefix("round-")) for path in self.root.glob("round-*"))

    @property
    def shared(self) -> Path:
        """File of the weights from which owners start the open round."""
        return self._folder() / SINGLE_FILE

    @property
    def deadline(self) -> datetime:
        """Time until which the open round waits for owners."""
        return datetime.fromisoformat(read_json(self._folder() / ROUND_FILE)["deadline"])

    @property
    def is_closing(self) -> bool:
        """Whether it is recorded which owners count in the open round."""
        return (self._folder() / CLOSING_FILE).is_file()

    def delivered(self) -> dict[str, Delivery]:
        """Return the accepted deliveries of the open round, by owner."""
        deliveries = {}
        for owner in sorted(self.plan.owners):
            path = self._delivery_folder(owner) / DELIVERY_FILE
            if path.is_file():
                deliveries[owner] = Delivery(**read_json(path))
        return deliveries

    def refused(self) -> dict[str, dict[str, Any]]:
        """Return `code` and `reason` of each refusal in the open round, by owner."""
        folder = self._folder() / "refused"
        return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}

    def missing(self) -> list[str]:
        """Return the owners who have neither delivered in the open round nor been refused."""
        answered = self.delivered().keys() | self.refused().keys()
        return [owner for owner in self.plan.owners if owner not in answered]

    def state(self, now: datetime) -> RoundState:
        """Return whether the open round waits for owners, is ready to be closed, or is short of owners."""
        if self.is_closing:
            return "ready"
        if self.missing() and now < self.deadline:
            return "waiting"
        return "ready" if len(self.delivered()) >= self.plan.needed else "short"

    # --- changes ---

    def deliver(
        self, owner: str, file: Path, weight: float, now: datetime, *, number: int | None = None
    ) -> Refusal | None:
        """Accept an owner's weights for the open round, or return the refusal.

        `weight` is the owner's token count and `number` the round that the weights belong to (default: the open round). A
        second delivery replaces the first. Raises `UserError` for a name that is not an owner of these rounds.
        """
        self._require_owner(owner)
        number = self.number if number is None else number
        verdict: Refusal | ExaminedWeights = Refusal(RefusalCode.MANIFEST, f"{weight:g} tokens")
        if math.isfinite(weight) and weight > 0:
            verdict = examine_weights(file, Checkpoint([self.shared]), self.plan.rules)
        with self._locked():
            if self.number != number or self.is_closing or now >= self.deadline:
                return Refusal(RefusalCode.LATE)
            if isinstance(verdict, Refusal):
                self._record_refusal(owner, verdict.code.name, str(verdict))
                return verdict
            with new_folder(self._delivery_folder(owner), force=True, what="delivery") as partial:
                link_or_copy(file, partial / SINGLE_FILE)
                write_json(partial / DELIVERY_FILE, asdict(Delivery(verdict.digest, float(weight), verdict.change)))
            (self._folder() / "refused" / f"{owner}.json").unlink(missing_ok=True)
        return None

    def leave_out(self, owner: str, code: str, reason: str) -> None:
        """Record that an owner will not deliver in the open round; an accepted delivery still counts."""
        self._require_owner(owner)
        with self._locked():
            self._record_refusal(owner, code, reason)

    def readmit_owners(self) -> None:
        """Allow owners who were refused or left out of the open round to deliver again."""
        with self._locked():
            if not self.is_closing:
                remove_tree(self._folder() / "refused")

    def extend(self, deadline: datetime) -> None:
        """Extend the deadline of the open round; raises `UserError` for an earlier one."""
        with self._locked():
            if deadline < self.deadline:
                raise UserError(
                    f"the deadline of round {self.number} is {self.deadline.isoformat()} already; choose a later one"
                )
            content = read_json(self._folder() / ROUND_FILE)
            write_json(self._folder() / ROUND_FILE, content | {"deadline": deadline.isoformat()})

    def close(self, now: datetime) -> RoundReport:
        """Average the open round and open the next; raises `UserError` while owners are awaited or too few."""
        with self._locked():
            number, folder = self.number, self._folder()
            state = self.state(now)
            if state == "waiting":
                raise UserError(
                    f"round {number} waits for {', '.join(self.missing())} until {self.deadline.isoformat()}"
                )
            if state == "short":
                raise UserError(
                    f"{len(self.delivered())} of {len(self.plan.owners)} owners count in round {number}, and "
                    f"{self.plan.needed} are needed; extend its deadline, or let owners deliver again"
                )
            closing = self._record_closing(folder)
            self._open_next(number, closing, now)
            self.tidy()
            return self.report(number)

    def report(self, number: int) -> RoundReport:
        """Return the report of a closed round; raises `UserError` for any other."""
        path = self.root / _name(number + 1) / ROUND_FILE
        if not path.is_file():
            raise UserError(f"round {number} is not closed yet")
        content = read_json(path)
        before = content["before"]
        return RoundReport(number, content["digest"], before["shares"], before["refused"], tuple(before["missing"]))

    def _record_closing(self, folder: Path) -> dict[str, Any]:
        """Record once which owners count; later deliveries are late."""
        path = folder / CLOSING_FILE
        if not path.is_file():
            delivered = self.delivered()
            weights = {owner: delivery.weight for owner, delivery in delivered.items()}
            refused = {owner: refusal["reason"] for owner, refusal in self.refused().items()}
            write_json(
                path,
                {
                    "shares": owner_shares(weights, self.recipe, self.plan.rules),
                    "digests": {owner: delivery.digest for owner, delivery in delivered.items()},
                    "refused": {owner: reason for owner, reason in refused.items() if owner not in delivered},
                    "missing": self.missing(),
                },
            )
        return read_json(path)

    def _open_next(self, number: int, closing: Mapping[str, Any], now: datetime) -> None:
        folder = self.root / _name(number)
        state = folder / OUTER_FILE
        contributions = [
            Contribution(owner, self._delivery_folder(owner) / SINGLE_FILE, closing["digests"][owner], share)
            for owner, share in closing["shares"].items()
        ]
        with new_folder(self.root / _name(number + 1), what="round") as partial:
            digest = average_round(
                Checkpoint([folder / SINGLE_FILE]),
                contributions,
                Checkpoint([state]) if state.is_file() else None,
                self.recipe,
                partial / SINGLE_FILE,
                partial / OUTER_FILE,
            )
            deadline = now + timedelta(seconds=self.plan.round_seconds)
            _write_round(partial, number + 1, digest, deadline, closing)

    def work_folder(self, owner: str) -> Path:
        """Return a temporary folder for an owner who trains in this process; it is deleted when the round is closed."""
        folder = self._folder() / "work" / owner
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def tidy(self) -> None:
        """Delete deliveries and old weights of closed rounds; the records of the rounds stay."""
        open_number = self.number
        for number in range(open_number):
            folder = self.root / _name(number)
            for name in ("deliveries", "work"):
                remove_tree(folder / name)
            if number <= open_number - KEPT:
                for name in (SINGLE_FILE, OUTER_FILE):
                    (folder / name).unlink(missing_ok=True)

    def _record_refusal(self, owner: str, code: str, reason: str) -> None:
        folder = self._folder() / "refused"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{owner}.json", {"code": code, "reason": reason})

    def _require_owner(self, owner: str) -> None:
        if owner not in self.plan.owners:
            raise UserError(f"'{owner}' is not an owner of these rounds; owners: {', '.join(self.plan.owners)}")

    def _folder(self) -> Path:
        return self.root / _name(self.number)

    def _delivery_folder(self, owner: str) -> Path:
        return self._folder() / "deliveries" / owner

    def _locked(self) -> Any:
        return exclusive(self.root / ".lock", f"the rounds in {self.root}", patience_s=60)


def _name(number: int) -> str:
    return f"round-{number:05d}"


def _write_round(folder: Path, number: int, digest: str, deadline: datetime, before: Mapping[str, Any]) -> None:
    write_json(
        folder / ROUND_FILE,
        {
            "number": number,
            "digest": digest,
            "deadline": deadline.isoformat(),
            "before": dict(before),
        },
    )
