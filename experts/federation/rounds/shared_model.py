"""Coordinator's state of a shared model: its settings, its rounds and the seeds that owners download.

In `federation/shared/NAME/`:

    shared.json (settings)   rounds/   seeds/00003/ (seed of round 3)   finished.json (digest of the result)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ....core.artefacts.files import link_or_copy, new_folder, read_json, remove_tree, write_json
from ....core.artefacts.safetensors_io import INDEX_FILE, SINGLE_FILE, Checkpoint, new_file
from ....core.config.settings import ProjectConfig, TrainingConfig, validate_settings
from ....core.errors import UserError
from ....core.manifests.finishing import finish_artefact
from ....core.manifests.manifest import read_manifest
from ....core.manifests.run import RUN_FILE
from ..protocol.requests import Recipe, RoundOf, new_identifier, require_askable
from .rounds import RoundPlan, Rounds

FORMAT = 1
SETTINGS_FILE, FINISHED_FILE = "shared.json", "finished.json"
TRAINS = "all"
"""Trainer of a shared model: all parameters."""


@dataclass(frozen=True)
class SharedSettings:
    """Settings of a shared model for all rounds, in addition to the round plan."""

    total: int
    """Number of rounds."""
    training: Mapping[str, Any]
    """Training-loop settings, as in a recipe; `tokens` is one owner's budget for all rounds together."""
    priority: int = 0
    """Priority of the requests for its rounds."""

    def __post_init__(self) -> None:
        require_askable(self.training)
        config = self._config
        if config.steps < self.total:
            raise UserError(
                f"{config.tokens:,} tokens are {config.steps} steps of {config.tokens_per_step:,}, too few for "
                f"{self.total} rounds; ask for more --tokens, or for fewer --rounds"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps per round."""
        return self._config.steps // self.total

    @property
    def _config(self) -> TrainingConfig:
        overrides = validate_settings(TrainingConfig, dict(self.training), "the training of a recipe")
        return ProjectConfig().training_of(overrides)


class SharedModel:
    """One shared model; every call reads the disk, so that several processes agree."""

    def __init__(self, root: Path) -> None:
        content = read_json(root / SETTINGS_FILE)
        if content.get("format") != FORMAT:
            raise UserError(f"{root / SETTINGS_FILE} has format {content.get('format')}; this version reads {FORMAT}")
        self.root, self.name = root, root.name
        self.identifier, self.settings = str(content["rounds"]), SharedSettings(**content["settings"])
        self.rounds = Rounds(root / "rounds")

    @classmethod
    def begin(cls, root: Path, seed: Path, plan: RoundPlan, settings: SharedSettings, now: datetime) -> SharedModel:
        """Create a shared model from a seed's weights, replacing the remains of a killed attempt."""
        remove_tree(root)
        first_seed = root / "seeds" / _folder_name(0)
        make_round_seed(seed, None, first_seed)
        Rounds.begin(root / "rounds", first_seed / SINGLE_FILE, plan, now)
        write_json(root / SETTINGS_FILE, {"format": FORMAT, "rounds": new_identifier(), "settings": asdict(settings)})
        return cls(root)

    @property
    def is_finished(self) -> bool:
        """Whether the model has been written as a generalist."""
        return (self.root / FINISHED_FILE).is_file()

    @property
    def is_trained(self) -> bool:
        """Whether all rounds are closed."""
        return self.rounds.number >= self.settings.total

    def accepts(self, number: int) -> bool:
        """Return whether weights that start from a round's weights can count in the open round."""
        return not self.is_trained and self.rounds.accepts(number)

    def recipe(self) -> Recipe:
        """Return the recipe of requests for the open round."""
        round_ = RoundOf(self.name, self.identifier, self.rounds.number, self.settings.total, self.settings.steps)
        return Recipe(TRAINS, {}, dict(self.settings.training), round=round_)

    def seed_folder(self, number: int | None = None) -> Path:
        """Return the folder of a round's seed (default: the open round's), creating it if needed.

        Seeds of rounds whose weights cannot count any more are deleted. Raises `UserError` for such a round.
        """
        number = self.rounds.number if number is None else number
        folder = self.root / "seeds" / _folder_name(number)
        if not self.rounds.accepts(number):
            raise UserError(f"round {number + 1} of '{self.name}' is over")
        if not (folder / "seed.json").is_file():
            previous = max(path for path in folder.parent.iterdir() if (path / "seed.json").is_file())
            make_round_seed(previous, self.rounds.weights(number), folder)
            for path in folder.parent.iterdir():
                if not (path.name.isdigit() and self.rounds.accepts(int(path.name))):
                    remove_tree(path)
        return folder

    def finish(self, digest: str) -> None:
        """Record the digest of the result and delete all weights; the records of the rounds stay."""
        write_json(self.root / FINISHED_FILE, {"digest": digest})
        remove_tree(self.root / "seeds")
        for weights in self.rounds.root.glob("round-*/*.safetensors"):
            weights.unlink()


def make_round_seed(source: Path, weights: Path | None, target: Path) -> None:
    """Write a seed with the files of `source` and all weights in one file: `weights`, or by default the source's."""
    manifest = read_manifest(source)
    with new_folder(target, force=True, what="seed") as partial:
        for name in manifest.files:
            # Leave out the seed's run specification and its training state in a folder.
            if "/" not in name and name not in (INDEX_FILE, RUN_FILE) and not name.endswith(".safetensors"):
                link_or_copy(source / name, partial / name)
        if weights is None and (source / SINGLE_FILE).is_file():
            weights = source / SINGLE_FILE
        if weights is not None:
            link_or_copy(weights, partial / SINGLE_FILE)
        else:
            shards = Checkpoint.of_folder(source)
            with new_file(partial / SINGLE_FILE, dict(sorted(shards.shapes().items()))) as file:
                for tensor in sorted(shards):
                    for begin, end in shards.spans(tensor):
                        file.add(tensor, shards.span(tensor, begin, end))
        finish_artefact(partial, replace(manifest, metrics={}))


def _folder_name(number: int) -> str:
    return f"{number:05d}"
