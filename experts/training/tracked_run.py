"""The experiment trackers of a training run."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ...core.hooks.events import TrackedRun
from ...core.manifests.records import record_as_json
from ...core.tracking.tracking import Tracking, tracking
from ..runs.tracking import tracking_of, write_tracking
from .run_inputs import RunInputs


def tracked(run: RunInputs, first_step: int, *, is_main: bool) -> AbstractContextManager[Tracking]:
    """Return a block with the trackers of the project and of the command line; the main process has them.

    Private runs have none: their losses are functions of the private text without noise.
    """
    known = tracking_of(run.folder)
    trackers = {**{name: {} for name in known.trackers}, **run.project.tracking}
    if not is_main or run.spec.dp is not None:
        trackers = {}
    if trackers:
        write_tracking(run.folder, known)
    return tracking(
        trackers,
        TrackedRun(
            name=run.spec.name,
            kind=run.spec.kind,
            folder=run.folder,
            store=run.layout.tracking,
            id=known.id,
            configuration={**record_as_json(run.spec), "text": run.data_digests},
            first_step=first_step,
        ),
    )
