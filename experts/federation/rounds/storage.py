"""Storage of the rounds of a shared model: their files, without any decision about them.

In the folder of the rounds, where a round's folder appears at once, with the weights that owners start from:

    plan.json   round-00000/ (round.json, model.safetensors, outer.safetensors, closing.json)
    round-00000/deliveries/OWNER/   round-00000/refused/OWNER.json   round-00000/work/OWNER/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from ....core.artefacts.files import exclusive, link_or_copy, new_folder, read_json, remove_tree, write_json
from ....core.artefacts.safetensors_io import SINGLE_FILE
from ....core.errors import UserError
from ..judging.round_weights import AveragingRules
from .round_plan import Delivery, RoundPlan, RoundReport

FORMAT = 1
PLAN_FILE, ROUND_FILE, CLOSING_FILE, DELIVERY_FILE = "plan.json", "round.json", "closing.json", "delivery.json"
OUTER_FILE = "outer.safetensors"
"""State of the outer optimiser."""
KEPT = 2
"""Rounds whose weights are kept: the open one and its predecessor."""


class RoundFiles:
    """The files of one shared model's rounds; every call reads the disk, so that several processes agree."""

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

    @staticmethod
    def create(root: Path, plan: RoundPlan, start: Path, digest: str, deadline: datetime) -> None:
        """Write a plan, and round 0 with the weights of a safetensors file."""
        with new_folder(root, what="rounds") as partial:
            write_json(partial / PLAN_FILE, {"format": FORMAT, "start": digest, "plan": asdict(plan)})
            (partial / _name(0)).mkdir()
            link_or_copy(start, partial / _name(0) / SINGLE_FILE)
            _write_round(partial / _name(0), 0, digest, deadline, {})

    def locked(self) -> AbstractContextManager[None]:
        return exclusive(self.root / ".lock", f"the rounds in {self.root}", patience_s=60)

    # --- the open round ---

    @property
    def number(self) -> int:
        """Number of the open round, which equals the number of closed rounds."""
        return max(int(path.name.removeprefix("round-")) for path in self.root.glob("round-*"))

    @property
    def folder(self) -> Path:
        """Folder of the open round."""
        return self.root / _name(self.number)

    @property
    def shared(self) -> Path:
        """File of the weights from which owners start the open round."""
        return self.folder / SINGLE_FILE

    @property
    def deadline(self) -> datetime:
        """Time until which the open round waits for owners."""
        return datetime.fromisoformat(read_json(self.folder / ROUND_FILE)["deadline"])

    def write_deadline(self, deadline: datetime) -> None:
        path = self.folder / ROUND_FILE
        write_json(path, read_json(path) | {"deadline": deadline.isoformat()})

    def delivered(self) -> dict[str, Delivery]:
        """Return the accepted deliveries of the open round, by owner."""
        paths = {owner: self.delivery_folder(owner) / DELIVERY_FILE for owner in sorted(self.plan.owners)}
        return {owner: Delivery(**read_json(path)) for owner, path in paths.items() if path.is_file()}

    def delivery_folder(self, owner: str) -> Path:
        return self.folder / "deliveries" / owner

    def write_delivery(self, owner: str, file: Path, delivery: Delivery) -> None:
        """Store an owner's accepted weights in place of an earlier delivery or refusal; they appear at once."""
        with new_folder(self.delivery_folder(owner), force=True, what="delivery") as partial:
            link_or_copy(file, partial / SINGLE_FILE)
            write_json(partial / DELIVERY_FILE, asdict(delivery))
        (self.folder / "refused" / f"{owner}.json").unlink(missing_ok=True)

    def refused(self) -> dict[str, dict[str, Any]]:
        """Return `code` and `reason` of each refusal in the open round, by owner."""
        return {path.stem: read_json(path) for path in sorted((self.folder / "refused").glob("*.json"))}

    def write_refusal(self, owner: str, code: str, reason: str) -> None:
        folder = self.folder / "refused"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{owner}.json", {"code": code, "reason": reason})

    def forget_refusals(self) -> None:
        remove_tree(self.folder / "refused")

    def missing(self) -> list[str]:
        """Return the owners who have neither delivered in the open round nor been refused."""
        answered = self.delivered().keys() | self.refused().keys()
        return [owner for owner in self.plan.owners if owner not in answered]

    def work_folder(self, owner: str) -> Path:
        """Return a temporary folder for an owner who trains in this process; it is deleted when the round is closed."""
        folder = self.folder / "work" / owner
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # --- closing ---

    @property
    def is_closing(self) -> bool:
        """Whether it is recorded which owners count in the open round."""
        return (self.folder / CLOSING_FILE).is_file()

    def closing(self) -> dict[str, Any]:
        """Return which owners count in the open round: `shares` and `digests`, beside `refused` and `missing`."""
        return read_json(self.folder / CLOSING_FILE)

    def write_closing(self, closing: Mapping[str, Any]) -> None:
        write_json(self.folder / CLOSING_FILE, closing)

    def open_next(self, write_weights: Callable[[Path], str], deadline: datetime) -> None:
        """Open the next round; `write_weights` writes its weights into a folder and returns their digest."""
        number = self.number + 1
        with new_folder(self.root / _name(number), what="round") as partial:
            _write_round(partial, number, write_weights(partial), deadline, self.closing())

    def report(self, number: int) -> RoundReport:
        """Return the report of a closed round; raises `UserError` for any other."""
        path = self.root / _name(number + 1) / ROUND_FILE
        if not path.is_file():
            raise UserError(f"round {number} is not closed yet")
        content = read_json(path)
        before = content["before"]
        return RoundReport(number, content["digest"], before["shares"], before["refused"], tuple(before["missing"]))

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


def _name(number: int) -> str:
    return f"round-{number:05d}"


def _write_round(folder: Path, number: int, digest: str, deadline: datetime, before: Mapping[str, Any]) -> None:
    content = {"number": number, "digest": digest, "deadline": deadline.isoformat(), "before": dict(before)}
    write_json(folder / ROUND_FILE, content)
