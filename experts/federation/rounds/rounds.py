"""Synchronous rounds of a shared model: which deliveries are accepted, and when a round is closed and averaged.

Safe to kill at any point: closing a round first records which owners count, then creates the next round's folder at
once. A process that resumes therefore averages the same weights to the same bytes.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from ....core.artefacts.digests import digest_of_tensors
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint
from ....core.errors import UserError
from ..judging.acceptance import Refusal, RefusalCode
from ..judging.round_weights import ExaminedWeights, examine_weights
from .averaging import Contribution, average_round, outer_recipe, owner_shares
from .round_plan import Delivery, RoundPlan, RoundReport
from .storage import OUTER_FILE, RoundFiles

RoundState = Literal["waiting", "ready", "short"]


class Rounds(RoundFiles):
    """The rounds of one shared model, in a folder."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.recipe = outer_recipe(self.plan.recipe)

    @classmethod
    def begin(cls, root: Path, start: Path, plan: RoundPlan, now: datetime) -> Rounds:
        """Open round 0 with the weights of a safetensors file, or resume rounds with the same plan and weights.

        Raises `UserError` if the folder holds other rounds.
        """
        digest = digest_of_tensors(Checkpoint([start]).digests())
        if not root.exists():
            cls.create(root, plan, start, digest, now + timedelta(seconds=plan.round_seconds))
        rounds = cls(root)
        if rounds.plan != plan or rounds.start != digest:
            raise UserError(f"{root} holds rounds of another plan or model; choose another folder, or remove it")
        return rounds

    def state(self, now: datetime) -> RoundState:
        """Return whether the open round waits for owners, is ready to be closed, or is short of owners."""
        if self.is_closing:
            return "ready"
        if self.missing() and now < self.deadline:
            return "waiting"
        return "ready" if len(self.delivered()) >= self.plan.needed else "short"

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
        with self.locked():
            if self.number != number or self.is_closing or now >= self.deadline:
                return Refusal(RefusalCode.LATE)
            if isinstance(verdict, Refusal):
                self.write_refusal(owner, verdict.code.name, str(verdict))
                return verdict
            self.write_delivery(owner, file, Delivery(verdict.digest, float(weight), verdict.change))
        return None

    def leave_out(self, owner: str, code: str, reason: str) -> None:
        """Record that an owner will not deliver in the open round; an accepted delivery still counts."""
        self._require_owner(owner)
        with self.locked():
            self.write_refusal(owner, code, reason)

    def readmit_owners(self) -> None:
        """Allow owners who were refused or left out of the open round to deliver again."""
        with self.locked():
            if not self.is_closing:
                self.forget_refusals()

    def extend(self, deadline: datetime) -> None:
        """Extend the deadline of the open round; raises `UserError` for an earlier one."""
        with self.locked():
            if deadline < self.deadline:
                raise UserError(
                    f"the deadline of round {self.number} is {self.deadline.isoformat()} already; choose a later one"
                )
            self.write_deadline(deadline)

    def close(self, now: datetime) -> RoundReport:
        """Average the open round and open the next; raises `UserError` while owners are awaited or too few."""
        with self.locked():
            number, state = self.number, self.state(now)
            if state == "waiting":
                raise UserError(
                    f"round {number} waits for {', '.join(self.missing())} until {self.deadline.isoformat()}"
                )
            if state == "short":
                raise UserError(
                    f"{len(self.delivered())} of {len(self.plan.owners)} owners count in round {number}, and "
                    f"{self.plan.needed} are needed; extend its deadline, or let owners deliver again"
                )
            if not self.is_closing:
                self._record_closing()
            self.open_next(self._average, now + timedelta(seconds=self.plan.round_seconds))
            self.tidy()
            return self.report(number)

    def _record_closing(self) -> None:
        """Record which owners count; later deliveries are late."""
        delivered = self.delivered()
        weights = {owner: delivery.weight for owner, delivery in delivered.items()}
        refused = {owner: refusal["reason"] for owner, refusal in self.refused().items()}
        self.write_closing(
            {
                "shares": owner_shares(weights, self.recipe, self.plan.rules),
                "digests": {owner: delivery.digest for owner, delivery in delivered.items()},
                "refused": {owner: reason for owner, reason in refused.items() if owner not in delivered},
                "missing": self.missing(),
            }
        )

    def _average(self, folder: Path) -> str:
        """Write the average of the weights that count into the next round's folder; return its digest."""
        closing, state = self.closing(), self.folder / OUTER_FILE
        contributions = [
            Contribution(owner, self.delivery_folder(owner) / SINGLE_FILE, closing["digests"][owner], share)
            for owner, share in closing["shares"].items()
        ]
        return average_round(
            Checkpoint([self.shared]),
            contributions,
            Checkpoint([state]) if state.is_file() else None,
            self.recipe,
            folder / SINGLE_FILE,
            folder / OUTER_FILE,
        )

    def _require_owner(self, owner: str) -> None:
        if owner not in self.plan.owners:
            raise UserError(f"'{owner}' is not an owner of these rounds; owners: {', '.join(self.plan.owners)}")
