"""Destinations of accepted deliveries: the workspace's experts, or the open round of a shared model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from ....core.artefacts.files import link_or_copy, remove_tree
from ....core.artefacts.layout import Layout, check_name
from ....core.artefacts.safetensors_io import SINGLE_FILE
from ....core.errors import UserError
from ....core.manifests.manifest import read_manifest
from ..judging.acceptance import HeldOut, Measure, Refusal, RefusalCode, Rules, refusal_of_expert
from ..protocol.delivery import SignedStatement
from ..protocol.requests import ExpertRequest
from ..rounds.shared_model import SharedModel


@dataclass(frozen=True)
class ExpertsFolder:
    """`experts/NAME` of a workspace, with a number if the name exists."""

    layout: Layout
    rules: Rules
    measure: Measure

    @property
    def seed(self) -> Path:
        """Folder of the seed that the owner started from."""
        return self.layout.seed

    def judge(self, folder: Path, signed: SignedStatement, request: ExpertRequest) -> Refusal | None:
        """Return the refusal of an artefact's folder, or None."""
        return refusal_of_expert(
            folder, signed, request, self.seed, self.rules, lambda: self.measure(self.seed, folder)
        )

    def take(self, folder: Path, request: ExpertRequest) -> str:
        """Move an accepted artefact's folder and return the artefact's name."""
        name, number = request.owner, 2
        while (self.layout.experts / name).exists():
            name, number = f"{request.owner}-{number}", number + 1
        self.layout.experts.mkdir(parents=True, exist_ok=True)
        folder.rename(self.layout.experts / check_name(name, "an expert"))
        return name


@dataclass(frozen=True)
class OpenRound:
    """The open round of a shared model."""

    shared: SharedModel
    rules: Rules
    measure: Measure
    now: Callable[[], datetime]

    @property
    def seed(self) -> Path:
        return self.shared.seed_folder()

    def judge(self, folder: Path, signed: SignedStatement, request: ExpertRequest) -> Refusal | None:
        """Apply the checks of an expert, then those of the round; a refused owner is left out of the round."""
        round_, rounds = request.recipe.round, self.shared.rounds
        assert round_ is not None
        if rounds.number != round_.number:  # the round may have closed before a restart sent the verdict
            counted = rounds.number > round_.number and request.owner in rounds.report(round_.number).shares
            return None if counted else Refusal(RefusalCode.LATE)
        refusal = refusal_of_expert(folder, signed, request, self.seed, self.rules, lambda: self._held_out(folder))
        if refusal is not None:
            rounds.leave_out(request.owner, refusal.code.name, str(refusal))
            return refusal
        try:  # token count that the owner declares, to two significant digits
            weight = float(sum(domain.tokens for domain in read_manifest(folder).domains.values()))
        except (UserError, OverflowError):
            weight = 0.0
        return rounds.deliver(request.owner, folder / SINGLE_FILE, weight, self.now(), number=round_.number)

    def take(self, folder: Path, request: ExpertRequest) -> str:
        remove_tree(folder)  # `judge` has copied the weights into the round
        return str(request.recipe.round)

    def _held_out(self, folder: Path) -> HeldOut | None:
        """Score the owner's weights with the configuration and tokenizer of the round's seed."""
        with TemporaryDirectory(prefix=".candidate-", dir=self.shared.root) as scratch:
            model = Path(scratch)
            for path in self.seed.iterdir():
                if path.name not in (SINGLE_FILE, "seed.json"):
                    link_or_copy(path, model / path.name)
            link_or_copy(folder / SINGLE_FILE, model / SINGLE_FILE)
            return self.measure(self.seed, model)
