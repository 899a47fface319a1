"""One training run as a folder: everything that a process needs to know, before it starts and after it died."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...core.artefacts.files import read_json, write_json
from ...core.artefacts.lineage import MANIFEST_NAMES
from ...core.config.settings import DpConfig, TrainingConfig
from ...core.errors import UserError

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "training.log"
STATE_FOLDER = ".training"


@dataclass(frozen=True)
class RunSpec:
    """What one run trains. `run.json` in the folder that will become the seed or the expert."""

    kind: str
    """`seed`, `expert` or `generalist`: what the folder becomes."""
    name: str
    domains: tuple[str, ...]
    """Drawn in turn, one block each, when there are several."""
    training: TrainingConfig
    trains: str = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=lambda: {"seed": 1.0})
    """Where it starts: `seed`, or experts with weights that sum to 1."""
    parents: Mapping[str, str] = field(default_factory=dict)
    """Digests of the seed and of the experts it starts from, as they were when it was branched."""
    base: str | None = None
    """The generalist (or `seed`) that a generalist is trained from."""
    slice: tuple[int, int] | None = None
    """(i, n): train on the i-th of n random slices of all domains together instead (a control)."""
    preset: str | None = None
    """Size of a seed made from scratch."""
    family: str | None = None
    """Style of a seed made from scratch."""
    owner: str | None = None
    licence: str | None = None
    dp: DpConfig | None = None
    """Set: trained with differential privacy."""

    def write(self, folder: Path) -> None:
        write_json(folder / RUN_FILE, self.content())

    def content(self) -> dict[str, Any]:
        """Return the specification as JSON."""
        content = asdict(self) | {"training": self.training.model_dump(mode="json")}
        content.pop("dp")
        return content | ({"dp": self.dp.model_dump(mode="json")} if self.dp is not None else {})


def read_run(folder: Path) -> RunSpec:
    """Read a run folder's specification; raises `UserError` if the folder is none."""
    content = read_json(folder / RUN_FILE)
    try:
        cut = content.pop("slice")
        private = content.pop("dp", None)
        return RunSpec(
            dp=DpConfig.model_validate(private) if private is not None else None,
            training=TrainingConfig.model_validate(content.pop("training")),
            domains=tuple(content.pop("domains")),
            slice=tuple(cut) if cut else None,
            **content,
        )
    except (KeyError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{folder / RUN_FILE} is damaged ({first}); delete {folder} and begin again"
        ) from None


def is_finished(folder: Path) -> bool:
    """Tell whether a run folder has become an artefact."""
    return any((folder / name).is_file() for name in MANIFEST_NAMES.values())
