"""A shared model whose rounds are over, as a generalist of the workspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ....core.artefacts.files import link_or_copy, new_folder
from ....core.artefacts.lineage import (
    Manifest,
    Parent,
    digest_of_tensors,
    digests_of_folder,
    read_manifest,
    tool_versions,
)
from ..rounds.shared_model import SharedModel
from .coordinator import Coordinator

KIND = "shared"
"""In `config.kind` of the manifest: nobody can be taken out of it."""


def write_shared_generalist(coordinator: Coordinator, shared: SharedModel) -> Manifest:
    """Write `generalists/NAME` and return its manifest; where it stands already with the same weights, only that.

    Raises `UserError` for another artefact of that name.
    """
    layout, last = coordinator.layout, shared.seed_folder()
    target = layout.generalists / shared.name
    weights = read_manifest(last).digest
    if (target / "generalist.json").is_file() and read_manifest(target).digest == weights:
        return read_manifest(target)
    with new_folder(target, what="generalist") as partial:
        for path in sorted(last.iterdir()):
            if path.name not in ("seed.json", "README.md"):
                link_or_copy(path, partial / path.name)
        tensors, files = digests_of_folder(partial)
        manifest = _manifest(coordinator, shared, tensors, files)
        manifest.write(partial)
    return manifest


def _manifest(
    coordinator: Coordinator, shared: SharedModel, tensors: Mapping[str, str], files: Mapping[str, str]
) -> Manifest:
    rounds, seed = shared.rounds, read_manifest(shared.seed_folder())
    reports = [rounds.report(number) for number in range(shared.settings.total)]
    return Manifest(
        kind="generalist",
        name=shared.name,
        digest=digest_of_tensors(tensors),
        tensors=tensors,
        files=files,
        tokenizer=seed.tokenizer,
        parents=(Parent("seed", "seed", rounds.start, None, seed.owner, seed.licence),),
        config={
            "method": rounds.plan.recipe,
            "kind": KIND,
            "weights": {},
            "options": {"quorum": rounds.plan.quorum, **asdict(rounds.plan.rules)},
            "training": {**shared.settings.training, "steps_per_round": shared.settings.steps},
            "rounds": [asdict(report) for report in reports],
        },
        data=_statements(coordinator, shared),
        licence=seed.licence,
        versions=tool_versions(),
    )


def _statements(coordinator: Coordinator, shared: SharedModel) -> dict[str, Any]:
    """Return what each owner said of its text when it last counted."""
    found: dict[str, Any] = {}
    for request, signed in coordinator.accepted():
        part = request.recipe.round
        if part is not None and part.rounds == shared.identifier:
            number, _ = found.get(request.owner, (-1, {}))
            if part.number > number:
                found[request.owner] = (part.number, dict(signed.statement.data))
    return {owner: {"domains": data.get("domains", {})} for owner, (_, data) in sorted(found.items())}
