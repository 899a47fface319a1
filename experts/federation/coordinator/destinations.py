"""Where an owner's delivery goes when it is good: among the workspace's experts, or into the open round of a shared model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from ....core.artefacts.files import link_or_copy, remove_tree
from ....core.artefacts.layout import Layout, check_name
from ....core.artefacts.lineage import read_manifest
from ....core.artefacts.safetensors_io import SINGLE_FILE
from ....core.errors import UserError
from ..judging.acceptance import HeldOut, Measure, Refusal, RefusalCode, Rules, refusal_of_expert
from ..protocol.delivery import Signed
from ..protocol.requests import ExpertRequest
from ..rounds.shared_model import SharedModel


class Destination(Protocol):
    """Judges what has arrived, and puts it into its place."""

    @property
    def seed(self) -> Path:
        """Folder of what the owner started from."""
        ...

    def judge(self, folder: Path, signed: Signed, request: ExpertRequest) -> Refusal | None:
        """Say why an artefact's folder is not taken, or None."""

    def take(self, folder: Path, request: ExpertRequest) -> str:
        """Take what was judged, folder and all, and return what it is called here."""
        ...


@dataclass(frozen=True)
class AmongExperts:
    """`experts/NAME` of a workspace."""

    layout: Layout
    rules: Rules
    measure: Measure

    @property
    def seed(self) -> Path:
        return self.layout.seed

    def judge(self, folder: Path, signed: Signed, request: ExpertRequest) -> Refusal | None:
        return refusal_of_expert(
            folder, signed, request, self.seed, self.rules, lambda: self.measure(self.seed, folder)
        )

    def take(self, folder: Path, request: ExpertRequest) -> str:
        name, number = request.owner, 2
        while (self.layout.experts / name).exists():
            name, number = f"{request.owner}-{number}", number + 1
        self.layout.experts.mkdir(parents=True, exist_ok=True)
        folder.rename(self.layout.experts / check_name(name, "an expert"))
        return name


@dataclass(frozen=True)
class IntoRound:
    """A round of a shared model."""

    shared: SharedModel
    rules: Rules
    measure: Measure
    now: Callable[[], datetime]

    @property
    def seed(self) -> Path:
        return self.shared.seed_folder()

    def judge(self, folder: Path, signed: Signed, request: ExpertRequest) -> Refusal | None:
        """Judge as an expert is judged, then by what the round asks; who does not pass is not waited for any more."""
        part, rounds = request.recipe.round, self.shared.rounds
        assert part is not None
        if rounds.number != part.number:  # a restart between counting and telling may have closed the round
            counted = rounds.number > part.number and request.owner in rounds.report(part.number).shares
            return None if counted else Refusal(RefusalCode.LATE)
        refusal = refusal_of_expert(
            folder, signed, request, self.seed, self.rules, lambda: self._held_out(folder)
        )
        if refusal is not None:
            rounds.leave_out(request.owner, refusal.code.name, str(refusal))
            return refusal
        weight = tokens_of_text(folder)
        return rounds.deliver(request.owner, folder / SINGLE_FILE, weight, self.now(), number=part.number)

    def take(self, folder: Path, request: ExpertRequest) -> str:
        remove_tree(folder)  # the round has its weights
        return str(request.recipe.round)

    def _held_out(self, folder: Path) -> HeldOut | None:
        """Score the owner's weights as the model that they are, since no seed of the workspace belongs to them."""
        with TemporaryDirectory(prefix=".candidate-", dir=self.shared.root) as scratch:
            model = Path(scratch)
            for path in self.seed.iterdir():
                if path.name not in (SINGLE_FILE, "seed.json"):
                    link_or_copy(path, model / path.name)
            link_or_copy(folder / SINGLE_FILE, model / SINGLE_FILE)
            return self.measure(self.seed, model)


def tokens_of_text(folder: Path) -> float:
    """Return how many tokens of text an owner says that there are (to two digits); 0 where it says nothing that makes sense."""
    try:
        domains = read_manifest(folder).data["domains"].values()
        return float(sum(int(one["tokens"]) for one in domains))
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return 0.0
