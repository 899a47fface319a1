"""Which trackers record a run beside those of `expertctl.yaml`, and the id by which they know it when it is resumed."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from pathlib import Path

from ...core.artefacts.files import read_json, write_json
from ...core.errors import UserError
from ...core.manifests.records import parse_record, record, record_as_json
from ...core.manifests.run import STATE_FOLDER, read_run
from ...core.reporting import Reporter

_FILE = "tracking.json"


@record
class RunTracking:
    """The tracking of an unfinished run, in its state folder; a run that is started over gets another one."""

    id: str
    trackers: tuple[str, ...] = ()
    """Trackers of the command line."""


def tracking_of(run: Path) -> RunTracking:
    """Return the tracking of a run; one that has none yet gets a new id."""
    file = run / STATE_FOLDER / _FILE
    if not file.is_file():
        return RunTracking(uuid.uuid4().hex[:12])
    return parse_record(RunTracking, read_json(file), str(file))


def write_tracking(run: Path, tracking: RunTracking) -> None:
    """Keep the tracking of a run until it is finished."""
    file = run / STATE_FOLDER / _FILE
    file.parent.mkdir(exist_ok=True)
    write_json(file, record_as_json(tracking))


def note_tracking(run: Path, names: Collection[str], declared: Collection[str], reporter: Reporter) -> None:
    """Let trackers beside the `declared` ones record a run, from now on and when it is resumed."""
    if not names and not declared:
        return
    try:
        is_private = read_run(run).dp is not None
    except UserError:  # of a damaged run, its worker says what is wrong
        return
    if is_private:
        reporter.say(f"'{run.name}' trains with differential privacy: nothing is passed on to trackers")
    elif names:
        known = tracking_of(run)
        write_tracking(run, RunTracking(known.id, tuple(dict.fromkeys([*known.trackers, *names]))))
