"""Synchronous rounds of a shared model: which deliveries are accepted, and when a round is closed and averaged.

Safe to kill at any point: closing a round first records which owners count, then creates the next round's folder at
once. A process that resumes therefore averages the same weights to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from ....core.artefacts.digests import digest_of_tensors
from ....core.artefacts.files import exclusive, link_or_copy, new_folder, read_json, remove_tree, write_json
from ....core.artefacts.layout import check_name
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint
from ....core.errors import UserError
from ..judging.refusal import Refusal, RefusalCode
from ..judging.round_weights import AveragingRules, Delivery, examine_delivery
from .averaging import Contribution, average_round, outer_recipe, owner_shares
from .storage import ROUND_FILE, Round, write_round

FORMAT = 1
PLAN_FILE = "plan.json"
KEPT = 2
"""Rounds whose weights are kept: the open one and its predecessor; and those that late deliveries start from."""

MOST_LATE = 100

RoundState = Literal["waiting", "ready", "short"]


def quorum_size(quorum: float, owners: int) -> int:
    """Return the number of owners that a share of them amounts to, rounded up, at least 1."""
    return max(math.ceil(quorum * owners - 1e-9), 1)  # 0.7 * 10 is 7 despite binary rounding


@dataclass(frozen=True)
class RoundPlan:
    """Settings that are the same for all rounds."""

    owners: tuple[str, ...]
    recipe: str
    """`diloco` or `fedavg`."""
    quorum: float = 1.0
    """Share of the owners that a round needs."""
    round_seconds: float = 86_400.0
    """Seconds from the start of a round to its deadline."""
    rules: AveragingRules = field(default_factory=AveragingRules)
    grace_seconds: float | None = None
    """Seconds that a round waits for further owners once it has its quorum; None: until its deadline."""
    late_rounds: int = 0
    """Rounds for which a delivery still counts after its own round is closed."""

    def __post_init__(self) -> None:
        outer_recipe(self.recipe)
        if not self.owners or len(set(self.owners)) != len(self.owners):
            raise UserError("rounds need at least one owner, and no owner twice")
        for owner in self.owners:
            check_name(owner, "an owner")
        if not 0 < self.quorum <= 1 or not self.round_seconds > 0:
            raise UserError("the quorum must be a share between 0 and 1, and a round longer than 0 seconds")
        if not (self.grace_seconds is None or self.grace_seconds >= 0) or not 0 <= self.late_rounds <= MOST_LATE:
            raise UserError(
                f"the grace must be at least 0 seconds, and deliveries can be from 0 to {MOST_LATE} rounds late"
            )

    @property
    def needed(self) -> int:
        """Number of owners that must deliver."""
        return quorum_size(self.quorum, len(self.owners))


@dataclass(frozen=True)
class RoundReport:
    """Result of one round."""

    number: int
    digest: str
    """Digest of the shared weights after the round."""
    shares: Mapping[str, float]
    """Weight of each owner in the average; sums to 1."""
    refused: Mapping[str, str]
    """Reason of each refusal, by owner."""
    missing: tuple[str, ...]
    """Owners who did not deliver."""
    late: Mapping[str, int]
    """Rounds by which deliveries were late, by owner, without those that were not."""


class Rounds:
    """The rounds of one shared model, in a folder with `plan.json` and `round-00000/` ...; every call reads the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / PLAN_FILE
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise UserError(f"{path} has format {content.get('format')}; this version reads {FORMAT}")
        try:
            plan = dict(content["plan"])
            rules = AveragingRules(**plan.pop("rules"))
            self.plan = RoundPlan(owners=tuple(plan.pop("owners")), rules=rules, **plan)
            self.start = content["start"]
            """Digest of the weights of round 0."""
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); restore it from a copy") from None
        self.recipe = outer_recipe(self.plan.recipe, self.plan.rules)
        self._duration = timedelta(seconds=self.plan.round_seconds)

    @classmethod
    def begin(cls, root: Path, start: Path, plan: RoundPlan, now: datetime) -> Rounds:
        """Open round 0 with the weights of a safetensors file, or resume rounds with the same plan and weights.

        Raises `UserError` if the folder holds other rounds.
        """
        digest = digest_of_tensors(Checkpoint([start]).digests())
        if not root.exists():
            with new_folder(root, what="rounds") as partial:
                write_json(partial / PLAN_FILE, {"format": FORMAT, "start": digest, "plan": asdict(plan)})
                first = partial / _name(0)
                first.mkdir()
                link_or_copy(start, first / SINGLE_FILE)
                write_round(first, 0, digest, now + timedelta(seconds=plan.round_seconds), {})
        rounds = cls(root)
        if rounds.plan != plan or rounds.start != digest:
            raise UserError(f"{root} holds rounds of another plan or model; choose another folder, or remove it")
        return rounds

    # --- the open round ---

    @property
    def open(self) -> Round:
        """The round that owners train now."""
        return max((Round(folder) for folder in self.root.glob("round-*")), key=lambda round_: round_.number)

    @property
    def number(self) -> int:
        """Number of the open round, which equals the number of closed rounds."""
        return self.open.number

    @property
    def is_closing(self) -> bool:
        """Whether it is recorded which owners count in the open round."""
        return self.open.closing.is_file()

    def delivered(self) -> dict[str, Delivery]:
        """Return the accepted deliveries of the open round, by owner."""
        deliveries = {owner: self.open.delivery(owner) for owner in sorted(self.plan.owners)}
        return {owner: delivery for owner, delivery in deliveries.items() if delivery is not None}

    def missing(self) -> list[str]:
        """Return the owners who have neither delivered in the open round nor been refused."""
        answered = self.delivered().keys() | self.open.refused().keys()
        return [owner for owner in self.plan.owners if owner not in answered]

    def state(self, now: datetime) -> RoundState:
        """Return whether the open round waits for owners, is ready to be closed, or is short of owners."""
        if self.is_closing:
            return "ready"
        delivered = self.delivered()
        if self.missing() and now < self._end_of_waiting(delivered.values()):
            return "waiting"
        return "ready" if len(delivered) >= self.plan.needed else "short"

    def _end_of_waiting(self, delivered: Collection[Delivery]) -> datetime:
        """Return when the open round no longer waits for missing owners."""
        deadline, grace = self.open.deadline, self.plan.grace_seconds
        if grace is None or len(delivered) < self.plan.needed:
            return deadline
        times = sorted(datetime.fromisoformat(delivery.at) for delivery in delivered)
        return min(deadline, times[self.plan.needed - 1] + timedelta(seconds=grace))

    def deliver(
        self, owner: str, file: Path, weight: float, now: datetime, *, number: int | None = None
    ) -> Refusal | None:
        """Accept an owner's weights for the open round, or return the refusal.

        `weight` is the owner's token count and `number` the round that the weights start from (default: the open round). A
        second delivery replaces the first. Raises `UserError` for a name that is not an owner of these rounds.
        """
        self._require_owner(owner)
        number = self.number if number is None else number
        if not self.accepts(number):
            return Refusal(RefusalCode.LATE)
        verdict = examine_delivery(file, weight, Checkpoint([self.weights(number)]), self.plan.rules)
        with self._locked():
            if self.is_closing and self.plan.late_rounds:  # a kill interrupted the closing
                self._open_next(now)
            is_over = not self.plan.late_rounds and (self.is_closing or now >= self.open.deadline)
            if is_over or not self.accepts(number):
                return Refusal(RefusalCode.LATE)
            if isinstance(verdict, Refusal):
                self.open.write_refusal(owner, verdict.code.name, str(verdict))
                return verdict
            late = self.number - number
            self.open.write_delivery(owner, file, replace(verdict, at=now.isoformat(), late=late))
        return None

    def accepts(self, number: int) -> bool:
        """Return whether weights that start from this round's weights can count in the open round."""
        return 0 <= self.number - number <= self.plan.late_rounds

    def has_counted(self, owner: str, number: int) -> bool:
        """Return whether an owner's weights that start from this round's weights count in a closed round."""
        reports = (self.report(closed) for closed in range(number, self.number))
        return any(owner in report.shares and report.number - report.late.get(owner, 0) == number for report in reports)

    def weights(self, number: int) -> Path:
        """Return the file of the weights that the owners start from in a round."""
        return Round(self.root / _name(number)).shared

    def leave_out(self, owner: str, code: str, reason: str) -> None:
        """Record that an owner will not deliver in the open round; an accepted delivery still counts."""
        self._require_owner(owner)
        with self._locked():
            self.open.write_refusal(owner, code, reason)

    def readmit_owners(self) -> None:
        """Allow owners who were refused or left out of the open round to deliver again."""
        with self._locked():
            if not self.is_closing:
                remove_tree(self.open.folder / "refused")

    def extend(self, deadline: datetime) -> None:
        """Extend the deadline of the open round; raises `UserError` for an earlier one."""
        with self._locked():
            current = self.open.deadline
            if deadline < current:
                raise UserError(
                    f"the deadline of round {self.number} is {current.isoformat()} already; choose a later one"
                )
            self.open.write_deadline(deadline)

    # --- closing ---

    def close(self, now: datetime) -> RoundReport:
        """Average the open round and open the next; raises `UserError` while owners are awaited or too few."""
        with self._locked():
            closed, state = self.open, self.state(now)
            if state == "waiting":
                raise UserError(
                    f"round {closed.number} waits for {', '.join(self.missing())} until {closed.deadline.isoformat()}"
                )
            if state == "short":
                raise UserError(
                    f"{len(self.delivered())} of {len(self.plan.owners)} owners count in round {closed.number}, and "
                    f"{self.plan.needed} are needed; extend its deadline, or let owners deliver again"
                )
            if not self.is_closing:
                write_json(closed.closing, self._closing_record())
            self._open_next(now)
            return self.report(closed.number)

    def _open_next(self, now: datetime) -> None:
        """Create the round after the open one, as its closing record says."""
        closed = self.open
        closing, number = read_json(closed.closing), closed.number + 1
        with new_folder(self.root / _name(number), what="round") as partial:
            write_round(partial, number, self._average(closed, closing, partial), now + self._duration, closing)
        self.tidy()

    def _closing_record(self) -> dict[str, Any]:
        """Return which owners count in the open round; later deliveries are late."""
        delivered = self.delivered()
        refused = self.open.refused()
        return {
            "shares": owner_shares(delivered, self.recipe, self.plan.rules),
            "digests": {owner: delivery.digest for owner, delivery in delivered.items()},
            "refused": {owner: refused[owner]["reason"] for owner in refused if owner not in delivered},
            "missing": self.missing(),
            "late": {owner: delivery.late for owner, delivery in delivered.items() if delivery.late},
        }

    def _average(self, closed: Round, closing: dict[str, Any], folder: Path) -> str:
        """Write the average of the weights that count into the next round's folder; return its digest."""
        starts = {owner: self.weights(closed.number - late) for owner, late in closing.get("late", {}).items()}
        contributions = [
            Contribution(
                owner, closed.delivery_folder(owner) / SINGLE_FILE, closing["digests"][owner], share, starts.get(owner)
            )
            for owner, share in closing["shares"].items()
        ]
        state = Checkpoint([closed.outer]) if closed.outer.is_file() else None
        files = folder / closed.shared.name, folder / closed.outer.name
        return average_round(Checkpoint([closed.shared]), contributions, state, self.recipe, *files)

    def report(self, number: int) -> RoundReport:
        """Return the report of a closed round; raises `UserError` for any other."""
        path = self.root / _name(number + 1) / ROUND_FILE
        if not path.is_file():
            raise UserError(f"round {number} is not closed yet")
        content = read_json(path)
        before = content["before"]
        late = before.get("late", {})  # absent in records of former versions
        return RoundReport(
            number, content["digest"], before["shares"], before["refused"], tuple(before["missing"]), late
        )

    def tidy(self) -> None:
        """Delete deliveries and old weights of closed rounds; the records of the rounds stay."""
        open_number = self.number
        for closed in (Round(self.root / _name(number)) for number in range(open_number)):
            for name in ("deliveries", "work"):
                remove_tree(closed.folder / name)
            if closed.number <= open_number - max(KEPT, self.plan.late_rounds + 1):
                for file in (closed.shared, closed.outer):
                    file.unlink(missing_ok=True)

    def _locked(self) -> AbstractContextManager[None]:
        return exclusive(self.root / ".lock", f"the rounds in {self.root}", patience_s=60)

    def _require_owner(self, owner: str) -> None:
        if owner not in self.plan.owners:
            raise UserError(f"'{owner}' is not an owner of these rounds; owners: {', '.join(self.plan.owners)}")


def _name(number: int) -> str:
    return f"round-{number:05d}"
