"""The record of a merge in experiment trackers."""

from __future__ import annotations

import uuid
from pathlib import Path

from ...core.artefacts.layout import Layout
from ...core.hooks.events import TrackedRun
from ...core.manifests.manifest import Manifest
from ...core.manifests.records import record_as_json
from ...core.tracking.tracking import TrackerOptions, tracking


def track_merge(trackers: TrackerOptions, layout: Layout, folder: Path, manifest: Manifest) -> None:
    """Record how a finished generalist was merged, and its digest."""
    text = {
        name: domain.digest
        for data in manifest.expert_data.values()
        for name, domain in {**data.domains, **data.annealing}.items()
    }
    run = TrackedRun(
        name=manifest.name,
        kind="merge",
        folder=folder,
        store=layout.tracking,
        id=uuid.uuid4().hex[:12],
        configuration={
            **(record_as_json(manifest.config) if manifest.config is not None else {}),
            "parents": {parent.name: parent.digest for parent in manifest.parents},
            "text": text,
        },
    )
    with tracking(trackers, run) as started:
        started.summary["digest"] = manifest.digest
