"""Conversion of a fully trained shared model into a generalist of the workspace."""

from __future__ import annotations

from dataclasses import asdict

from ....core.artefacts.files import link_or_copy, new_folder
from ....core.manifests.finishing import finish_artefact
from ....core.manifests.generalist import GeneralistConfig
from ....core.manifests.manifest import Manifest, Parent, read_manifest
from ....core.manifests.records import parse_record
from ....core.manifests.statements import DataStatement
from ..rounds.shared_model import SharedModel
from .coordinator import Coordinator

KIND = "shared"
"""Value of `config.kind` in the manifest of a generalist from which no owner can be removed."""


def write_shared_generalist(coordinator: Coordinator, shared: SharedModel) -> Manifest:
    """Write `generalists/NAME`, unless it exists with the same weights, and return its manifest.

    Raises `UserError` if another artefact has the name.
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
        return finish_artefact(partial, _manifest(coordinator, shared))


def _manifest(coordinator: Coordinator, shared: SharedModel) -> Manifest:
    rounds, seed = shared.rounds, read_manifest(shared.seed_folder())
    reports = [rounds.report(number) for number in range(shared.settings.total)]
    return Manifest(
        kind="generalist",
        name=shared.name,
        tokenizer=seed.tokenizer,
        parents=(Parent("seed", "seed", rounds.start, None, seed.owner, seed.licence),),
        config=GeneralistConfig(
            method=rounds.plan.recipe,
            kind="shared",
            options={"quorum": rounds.plan.quorum, **asdict(rounds.plan.rules)},
            training={**shared.settings.training, "steps_per_round": shared.settings.steps},
            rounds=tuple(asdict(report) for report in reports),
        ),
        expert_data=_statements(coordinator, shared),
        licence=seed.licence,
    )


def _statements(coordinator: Coordinator, shared: SharedModel) -> dict[str, DataStatement]:
    """Return the data statement of each owner's latest accepted delivery."""
    latest: dict[str, tuple[int, DataStatement]] = {}
    for request, signed in coordinator.accepted():
        round_ = request.recipe.round
        if round_ is not None and round_.rounds == shared.identifier:
            number, _ = latest.get(request.owner, (-1, DataStatement()))
            if round_.number > number:
                data = parse_record(DataStatement, dict(signed.statement.data), f"delivery of {request.owner}")
                latest[request.owner] = (round_.number, DataStatement(data.domains))
    return {owner: data for owner, (_, data) in sorted(latest.items())}
