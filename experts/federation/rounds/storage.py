"""Files of one round of a shared model, without any decision about them.

A round's folder appears at once, with the weights that owners start from:

    round.json   model.safetensors   outer.safetensors   closing.json (owners that count)
    deliveries/OWNER/   refused/OWNER.json   work/OWNER/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from ....core.artefacts.files import link_or_copy, new_folder, read_json, write_json
from ....core.artefacts.safetensors_io import SINGLE_FILE
from ..judging.round_weights import Delivery

ROUND_FILE, DELIVERY_FILE = "round.json", "delivery.json"


class Round:
    """The files of one round; every call reads the disk, so that several processes agree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = int(folder.name.removeprefix("round-"))
        self.shared, self.outer = folder / SINGLE_FILE, folder / "outer.safetensors"
        """Files of the weights from which owners start, and of the outer optimiser's state."""
        self.closing = folder / "closing.json"
        """Record of the owners that count (`shares`, `digests`, `late`) and of the others (`refused`, `missing`)."""

    @property
    def deadline(self) -> datetime:
        """Time until which the round waits for owners."""
        return datetime.fromisoformat(read_json(self.folder / ROUND_FILE)["deadline"])

    def write_deadline(self, deadline: datetime) -> None:
        path = self.folder / ROUND_FILE
        write_json(path, read_json(path) | {"deadline": deadline.isoformat()})

    def delivery_folder(self, owner: str) -> Path:
        return self.folder / "deliveries" / owner

    def delivery(self, owner: str) -> Delivery | None:
        """Return an owner's accepted delivery, or None."""
        path = self.delivery_folder(owner) / DELIVERY_FILE
        return Delivery(**read_json(path)) if path.is_file() else None

    def write_delivery(self, owner: str, file: Path, delivery: Delivery) -> None:
        """Store an owner's accepted weights in place of an earlier delivery or refusal; they appear at once."""
        with new_folder(self.delivery_folder(owner), force=True, what="delivery") as partial:
            link_or_copy(file, partial / SINGLE_FILE)
            write_json(partial / DELIVERY_FILE, asdict(delivery))
        (self.folder / "refused" / f"{owner}.json").unlink(missing_ok=True)

    def refused(self) -> dict[str, dict[str, Any]]:
        """Return `code` and `reason` of each refusal, by owner."""
        return {path.stem: read_json(path) for path in sorted((self.folder / "refused").glob("*.json"))}

    def write_refusal(self, owner: str, code: str, reason: str) -> None:
        folder = self.folder / "refused"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{owner}.json", {"code": code, "reason": reason})


def write_round(folder: Path, number: int, digest: str, deadline: datetime, before: Mapping[str, Any]) -> None:
    """Write the record of a round; `before` is the closing record of the previous round."""
    content = {"number": number, "digest": digest, "deadline": deadline.isoformat(), "before": dict(before)}
    write_json(folder / ROUND_FILE, content)
