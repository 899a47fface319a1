"""Synchronous rounds on disk: who delivered what for the shared model, and what it became. A kill at any point costs nothing.

A folder for each round, `round-00000` with the weights that the owners start from. What an owner hands in appears whole or not
at all; closing a round first writes down who counts, then the next round's folder, which appears complete. So whoever goes on
after a kill averages the same weights to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from ....core.artefacts.files import exclusive, link_or_copy, new_folder, read_json, remove_tree, write_json
from ....core.artefacts.lineage import digest_of_tensors
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint
from ....core.errors import UserError
from ..judging.acceptance import Refusal, RefusalCode
from .averaging import Contribution, Examined, average_round, examine_weights, outer_recipe, shares_of
from .round_plan import Delivery, RoundPlan, RoundReport, read_plan, write_plan

ROUND_FILE, CLOSING_FILE, OUTER_FILE = "round.json", "closing.json", "outer.safetensors"
DELIVERY_FILE = "delivery.json"
KEPT = 2
"""Rounds whose weights are kept: the one that is open, and the one before it."""


RoundState = Literal["waiting", "ready", "short"]


class Rounds:
    """The rounds of one shared model, in a folder. Every call reads the disk, so that several processes see the same."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plan, self.start = read_plan(root)  # the digest of the weights that round 0 starts from
        self.recipe = outer_recipe(self.plan.recipe)

    @classmethod
    def begin(cls, root: Path, start: Path, plan: RoundPlan, now: datetime) -> Rounds:
        """Open round 0 from the weights of a safetensors file; begun already with the same plan and weights, go on.

        Raises `UserError` where other rounds stand.
        """
        digest = digest_of_tensors(Checkpoint([start]).digests())
        if root.exists():
            found = cls(root)
            if found.plan != plan or found.start != digest:
                raise UserError(
                    f"{root} holds rounds of another plan or model; choose another folder, or remove it"
                )
            return found
        with new_folder(root, what="rounds") as partial:
            write_plan(partial, plan, digest)
            first = partial / _name(0)
            first.mkdir()
            link_or_copy(start, first / SINGLE_FILE)
            _write_round(first, 0, digest, now + timedelta(seconds=plan.round_seconds), {})
        return cls(root)

    # --- where it stands ---

    @property
    def number(self) -> int:
        """Number of the open round, which is how many were closed."""
        return max(int(path.name.removeprefix("round-")) for path in self.root.glob("round-*"))

    @property
    def shared(self) -> Path:
        """The weights that owners start the open round from."""
        return self._folder() / SINGLE_FILE

    @property
    def deadline(self) -> datetime:
        """When the open round no longer waits for owners."""
        return datetime.fromisoformat(read_json(self._folder() / ROUND_FILE)["deadline"])

    @property
    def is_closing(self) -> bool:
        """Tell whether it is settled who counts in the open round."""
        return (self._folder() / CLOSING_FILE).is_file()

    def delivered(self) -> dict[str, Delivery]:
        """Return what passed in the open round, by owner."""
        found = {}
        for owner in sorted(self.plan.owners):
            path = self._delivery(owner) / DELIVERY_FILE
            if path.is_file():
                found[owner] = Delivery(**read_json(path))
        return found

    def refused(self) -> dict[str, dict[str, Any]]:
        """Return `code` and `reason` of what did not pass in the open round, by owner."""
        folder = self._folder() / "refused"
        return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}

    def missing(self) -> list[str]:
        """Return the owners who have neither delivered in the open round nor been refused."""
        heard = self.delivered().keys() | self.refused().keys()
        return [owner for owner in self.plan.owners if owner not in heard]

    def state(self, now: datetime) -> RoundState:
        """Tell whether the open round waits for owners, can be closed, or has too few of them."""
        if self.is_closing:
            return "ready"
        if self.missing() and now < self.deadline:
            return "waiting"
        return "ready" if len(self.delivered()) >= self.plan.needed else "short"

    # --- what moves it on ---

    def deliver(
        self, owner: str, file: Path, weight: float, now: datetime, *, number: int | None = None
    ) -> Refusal | None:
        """Take in an owner's weights for the open round, or say why not; `weight` is the tokens that the owner counts by.

        Delivered again, the same weights change nothing, others replace the first. `number` is the round that they are meant
        for. Raises `UserError` for somebody who is no owner of these rounds.
        """
        self._require_owner(owner)
        number = self.number if number is None else number
        found: Refusal | Examined = Refusal(RefusalCode.MANIFEST, f"{weight:g} tokens")
        if math.isfinite(weight) and weight > 0:
            found = examine_weights(file, Checkpoint([self.shared]), self.plan.rules)
        with self._locked():
            if self.number != number or self.is_closing or now >= self.deadline:
                return Refusal(RefusalCode.LATE)
            if isinstance(found, Refusal):
                self._note_refused(owner, found.code.name, str(found))
                return found
            with new_folder(self._delivery(owner), force=True, what="delivery") as partial:
                link_or_copy(file, partial / SINGLE_FILE)
                write_json(
                    partial / DELIVERY_FILE, asdict(Delivery(found.digest, float(weight), found.change))
                )
            (self._folder() / "refused" / f"{owner}.json").unlink(missing_ok=True)
        return None

    def leave_out(self, owner: str, code: str, reason: str) -> None:
        """Note that an owner will not deliver in the open round, and why; one who has delivered counts all the same."""
        self._require_owner(owner)
        with self._locked():
            self._note_refused(owner, code, reason)

    def ask_again(self) -> None:
        """Let owners who were refused or left out in the open round deliver after all."""
        with self._locked():
            if not self.is_closing:
                remove_tree(self._folder() / "refused")

    def extend(self, deadline: datetime) -> None:
        """Give the open round more time; raises `UserError` for a deadline before the present one."""
        with self._locked():
            if deadline < self.deadline:
                raise UserError(f"round {self.number} has until {self.deadline.isoformat()} already")
            content = read_json(self._folder() / ROUND_FILE)
            write_json(self._folder() / ROUND_FILE, content | {"deadline": deadline.isoformat()})

    def close(self, now: datetime) -> RoundReport:
        """Average the open round and open the next; raises `UserError` while it waits, or has too few owners."""
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
                    f"{self.plan.needed} are needed; give it more time, or let owners deliver again"
                )
            closing = self._settle(folder)
            self._open_next(number, closing, now)
            self.tidy()
            return self.report(number)

    def report(self, number: int) -> RoundReport:
        """Return how a closed round ended."""
        path = self.root / _name(number + 1) / ROUND_FILE
        if not path.is_file():
            raise UserError(f"round {number} is not closed")
        content = read_json(path)
        before = content["before"]
        return RoundReport(
            number, content["digest"], before["shares"], before["refused"], tuple(before["missing"])
        )

    def _settle(self, folder: Path) -> dict[str, Any]:
        """Write down who counts, once: a delivery that comes after it is late."""
        path = folder / CLOSING_FILE
        if not path.is_file():
            delivered = self.delivered()
            weights = {owner: delivery.weight for owner, delivery in delivered.items()}
            refused = {owner: one["reason"] for owner, one in self.refused().items()}
            write_json(
                path,
                {
                    "shares": shares_of(weights, self.recipe, self.plan.rules),
                    "digests": {owner: delivery.digest for owner, delivery in delivered.items()},
                    "refused": {owner: why for owner, why in refused.items() if owner not in delivered},
                    "missing": self.missing(),
                },
            )
        return read_json(path)

    def _open_next(self, number: int, closing: Mapping[str, Any], now: datetime) -> None:
        folder = self.root / _name(number)
        state = folder / OUTER_FILE
        contributions = [
            Contribution(owner, self._delivery(owner) / SINGLE_FILE, closing["digests"][owner], share)
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
        """Return a folder for what an owner of this process writes in the open round; it goes when the round is closed."""
        folder = self._folder() / "work" / owner
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def tidy(self) -> None:
        """Remove weights of closed rounds that nobody needs any more; who delivered what stays in the rounds' records."""
        opened = self.number
        for number in range(opened):
            folder = self.root / _name(number)
            for name in ("deliveries", "work"):
                remove_tree(folder / name)
            if number <= opened - KEPT:
                for name in (SINGLE_FILE, OUTER_FILE):
                    (folder / name).unlink(missing_ok=True)

    def _note_refused(self, owner: str, code: str, reason: str) -> None:
        folder = self._folder() / "refused"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{owner}.json", {"code": code, "reason": reason})

    def _require_owner(self, owner: str) -> None:
        if owner not in self.plan.owners:
            raise UserError(f"'{owner}' is no owner of these rounds; they are {', '.join(self.plan.owners)}")

    def _folder(self) -> Path:
        return self.root / _name(self.number)

    def _delivery(self, owner: str) -> Path:
        return self._folder() / "deliveries" / owner

    def _locked(self) -> Any:
        return exclusive(self.root / ".lock", f"the rounds in {self.root}", patience_s=60)


def _name(number: int) -> str:
    return f"round-{number:05d}"


def _write_round(
    folder: Path, number: int, digest: str, deadline: datetime, before: Mapping[str, Any]
) -> None:
    write_json(
        folder / ROUND_FILE,
        {
            "number": number,
            "digest": digest,
            "deadline": deadline.isoformat(),
            "before": dict(before),
        },
    )
