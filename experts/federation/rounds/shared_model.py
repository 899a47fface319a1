"""The coordinator's side of a model that owners train together: its rounds, the weights they start from, and what came of them.

In `federation/shared/NAME/`:

    shared.json (what is asked for)   rounds/   seeds/00003/ (what owners fetch for round 3)   finished.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ....core.artefacts.files import link_or_copy, new_folder, read_json, remove_tree, write_json
from ....core.artefacts.lineage import digest_of_tensors, digests_of_folder, read_manifest
from ....core.artefacts.safetensors_io import INDEX_FILE, SINGLE_FILE, Checkpoint
from ....core.config.settings import ProjectConfig, TrainingConfig, checked
from ....core.errors import UserError, unknown_name
from ...runs.specification import RUN_FILE
from ..protocol.requests import Recipe, RoundOf, new_identifier
from ..protocol.tensor_stream import TensorStream
from .averaging import spans_of
from .round_plan import RoundPlan
from .rounds import Rounds

FORMAT = 1
SETTINGS_FILE, FINISHED_FILE = "shared.json", "finished.json"
TRAINS = "all"
"""What owners train of a shared model."""


@dataclass(frozen=True)
class SharedSettings:
    """What does not change while a shared model is trained, beside the plan of its rounds."""

    total: int
    """Rounds."""
    training: Mapping[str, Any]
    """Settings of the training loop, as in a recipe; `tokens` are those of one owner in all rounds together."""

    def __post_init__(self) -> None:
        config = self._config
        if config.steps < self.total:
            raise UserError(
                f"{config.tokens:,} tokens are {config.steps} steps of {config.tokens_per_step:,}, too few for "
                f"{self.total} rounds; ask for more --tokens, or for fewer --rounds"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps in a round."""
        return self._config.steps // self.total

    @property
    def _config(self) -> TrainingConfig:
        own = checked(TrainingConfig, dict(self.training), "the training of a recipe")
        return ProjectConfig().training_of(own)


class SharedModel:
    """One shared model. Every call reads the disk, so that several processes see the same."""

    def __init__(self, root: Path) -> None:
        content = read_json(root / SETTINGS_FILE)
        if content.get("format") != FORMAT:
            raise UserError(
                f"{root / SETTINGS_FILE} has format {content.get('format')}; this version reads {FORMAT}"
            )
        self.root, self.name = root, root.name
        self.identifier, self.settings = str(content["rounds"]), SharedSettings(**content["settings"])
        self.rounds = Rounds(root / "rounds")

    @classmethod
    def begin(
        cls, root: Path, seed: Path, plan: RoundPlan, settings: SharedSettings, now: datetime
    ) -> SharedModel:
        """Begin with the weights of a seed's folder; what a kill has left of an earlier beginning goes."""
        remove_tree(root)
        first = root / "seeds" / _folder_of(0)
        make_round_seed(seed, None, first)
        Rounds.begin(root / "rounds", first / SINGLE_FILE, plan, now)
        write_json(
            root / SETTINGS_FILE,
            {"format": FORMAT, "rounds": new_identifier(), "settings": asdict(settings)},
        )
        return cls(root)

    @property
    def is_finished(self) -> bool:
        """Tell whether the model stands among the generalists."""
        return (self.root / FINISHED_FILE).is_file()

    @property
    def is_trained(self) -> bool:
        """Tell whether all rounds are closed."""
        return self.rounds.number >= self.settings.total

    def recipe(self) -> Recipe:
        """Return what owners are asked for in the open round."""
        part = RoundOf(
            self.name, self.identifier, self.rounds.number, self.settings.total, self.settings.steps
        )
        return Recipe(TRAINS, {}, dict(self.settings.training), round=part)

    def seed_folder(self) -> Path:
        """Return the open round's weights as a seed that owners can fetch, making it where it was not made."""
        folder = self.root / "seeds" / _folder_of(self.rounds.number)
        if not (folder / "seed.json").is_file():
            before = max(path for path in folder.parent.iterdir() if (path / "seed.json").is_file())
            make_round_seed(before, self.rounds.shared, folder)
            for old in folder.parent.iterdir():
                if old != folder:
                    remove_tree(old)
        return folder

    def finish(self, digest: str) -> None:
        """Note what came of it, and let go of all weights; who delivered what in which round stays."""
        write_json(self.root / FINISHED_FILE, {"digest": digest})
        remove_tree(self.root / "seeds")
        for weights in self.rounds.root.glob("round-*/*.safetensors"):
            weights.unlink()


def shared_models(folder: Path) -> dict[str, SharedModel]:
    """Return the shared models of a federation by name."""
    found = sorted(path.parent for path in folder.glob(f"*/{SETTINGS_FILE}"))
    return {root.name: SharedModel(root) for root in found}


def shared_model(folder: Path, name: str) -> SharedModel:
    """Return one shared model; raises `UserError` where there is none of that name."""
    found = shared_models(folder)
    if name not in found:
        raise unknown_name("shared model", name, found)
    return found[name]


def make_round_seed(source: Path, weights: Path | None, target: Path) -> None:
    """Make a seed with the files of another and these weights in one file; without `weights` it has the other's own."""
    manifest = read_manifest(source)
    with new_folder(target, force=True, what="seed") as partial:
        for name in manifest.files:
            # Nothing of the seed's own training: its run, and its state in a folder.
            if "/" not in name and name not in (INDEX_FILE, RUN_FILE) and not name.endswith(".safetensors"):
                link_or_copy(source / name, partial / name)
        if weights is not None:
            link_or_copy(weights, partial / SINGLE_FILE)
        else:
            _gather(source, partial / SINGLE_FILE)
        tensors, files = digests_of_folder(partial)
        made = replace(manifest, digest=digest_of_tensors(tensors), tensors=tensors, files=files, metrics={})
        made.write(partial)


def _gather(source: Path, target: Path) -> None:
    """Put a seed's tensors into one file, whatever their shards."""
    if (source / SINGLE_FILE).is_file():
        link_or_copy(source / SINGLE_FILE, target)
        return
    shards = Checkpoint.of_folder(source)
    shapes = {name: (shards.entry(name).dtype, shards.entry(name).shape) for name in sorted(shards)}
    with TensorStream(target, shapes) as stream:
        for name in shapes:
            for begin, end in spans_of(shards, name):
                stream.add(name, shards.span(name, begin, end))


def _folder_of(number: int) -> str:
    return f"{number:05d}"
