"""`expertctl federate pack`, `work` and `deliver`: an offline federation by folders and files."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, option, path
from .options import coordinator_of, owner_from, recipe_from, stopped_by_signals, with_owner, with_recipe
from .review import require_consent
from .shared import shared_line

if TYPE_CHECKING:
    from ...experts.federation.coordinator.coordinator import Coordinator
    from ...experts.federation.protocol.requests import ExpertRequest


@cli_command("pack", example="expertctl federate pack site-a --recipe flexolmo --tokens 2000000 -o for-site-a.tar")
@click.argument("name", metavar="NAME")
@with_recipe
@path("-o, --output", "PATH", "Output folder, or file that ends in .tar.", required=True)
@flag("--without-seed", "Leave the seed out, if the owner has it.")
@option("--shared", "MODEL", "Request the open round of this shared model, started with `ask`, in place of an expert.")
@flag("--force", "Replace existing output.")
@pass_session
def pack(
    session: Session,
    /,
    name: str,
    output: Path,
    without_seed: bool,
    shared: str | None,
    force: bool,
    deadline: str,
    **recipe: Any,
) -> None:
    """Write a request for an owner to a folder or a .tar file."""
    from ...experts.federation.packs import write_pack

    coordinator = coordinator_of(session)
    request = (
        _request_expert(coordinator, name, deadline, recipe)
        if shared is None
        else _open_round_request(coordinator, name, shared)
    )
    write_pack(coordinator, request, output, with_seed=not without_seed, force=force)
    session.finish(
        {"request": request.id, "owner": name, "output": str(output), "deadline": request.deadline},
        f"request {request.id} for '{name}' is in {output}, until {request.deadline:%Y-%m-%d %H:%M} UTC",
        f"next, at the owner: expertctl federate work {output.name} --data FOLDER -o delivery.tar",
    )


def _request_expert(coordinator: Coordinator, name: str, deadline: str, recipe: dict[str, Any]) -> ExpertRequest:
    """Request an expert from an owner; raises `UserError` if one was accepted already."""
    from datetime import UTC

    from ...experts.federation.protocol.requests import deadline_in
    from ...experts.federation.rounds.averaging import OUTER_RECIPES

    if recipe["recipe_name"] in OUTER_RECIPES:
        raise UserError(
            f"start rounds with `expertctl federate ask --recipe {recipe['recipe_name']}`; then pack the open round with "
            "--shared MODEL"
        )
    requests = coordinator.ask([name], recipe_from(**recipe), deadline_in(deadline, datetime.now(UTC)))
    if not requests:
        raise UserError(f"'{name}' has delivered an expert for this recipe; choose another recipe")
    return requests[0]


def _open_round_request(coordinator: Coordinator, name: str, shared: str) -> ExpertRequest:
    """Return an owner's request for the open round of a shared model."""
    from ...experts.federation.coordinator.round_keeper import advance

    coordinator.files.members.get(name)
    model = coordinator.shared_model(shared)
    advance(coordinator, model)
    for request in coordinator.open_requests(name):
        if request.recipe.round is not None and request.recipe.round.model == shared:
            return request
    raise UserError(
        f"'{name}' has no open request for '{shared}': it has delivered, does not take part, or the deadline has passed; see "
        "`expertctl federate status`"
    )


@cli_command("work", example="expertctl federate work for-site-a.tar --data ./private -o delivery.tar")
@click.argument("pack_path", metavar="PACK", type=click.Path(path_type=Path))
@with_owner
@option("--seed", "DIR", "Folder of the seed, if the pack has none.", type=click.Path(path_type=Path, file_okay=False))
@path("-o, --output", "PATH", "Delivery for the coordinator: a folder, or a file that ends in .tar.", required=True)
@flag("--review", "List every tensor of the delivery, then ask.")
@flag("--yes", "Write the delivery without asking.")
@flag("--force", "Replace existing output.")
@pass_session
def work(
    session: Session,
    /,
    pack_path: Path,
    seed: Path | None,
    output: Path,
    review: bool,
    yes: bool,
    force: bool,
    **owner_options: Any,
) -> None:
    """Train the expert that a pack requests on your text, and write the delivery.

    If interrupted or killed, run the same command again to resume. Before the delivery is written, its content is shown and you are asked for
    your consent.
    """
    from ...core.artefacts.files import refuse_existing
    from ...core.manifests.records import record_as_json
    from ...experts.federation.owner.work import work as train
    from ...experts.federation.packs import SEED_FOLDER, open_pack, read_request, write_delivery

    refuse_existing(output, force=force, what="delivery")
    owner = owner_from(**owner_options)
    with open_pack(pack_path, owner.state) as folder:
        request = read_request(folder)
        owner.take(request)
        session.note(f"request {request.id}: {owner.describe(request)}")
        owner.drop_superseded()
        if not owner.seeds.has(request):
            source = seed or folder / SEED_FOLDER
            if not source.is_dir():
                raise UserError("the pack has no seed; name its folder with --seed")
            owner.seeds.copy(request, source)
    with stopped_by_signals() as stop, session.progress() as reporter:
        train(owner, request, reporter, stop.is_set)
    content = owner.review(request)
    require_consent(session, content, full=review, yes=yes)
    write_delivery(owner.delivery_folder(request), output, force=force)
    session.finish(
        {
            "request": request.id,
            "output": str(output),
            "files": content.files,
            "tensors": content.tensors,
            "data": record_as_json(content.data),
            "privacy": record_as_json(content.privacy) if content.privacy is not None else None,
        },
        f"the delivery is in {output}; next, at the coordinator: expertctl federate deliver {output.name}",
    )


@cli_command("deliver", example="expertctl federate deliver delivery.tar")
@click.argument("delivery", metavar="DELIVERY", type=click.Path(path_type=Path))
@pass_session
def deliver(session: Session, delivery: Path) -> None:
    """Judge an owner's delivery in a folder or file, and accept it.

    Runs every check that needs none of the owner's text. A refused delivery goes into quarantine with the reason, and the command
    exits with status 1.
    """
    from ...experts.federation.packs import REQUEST_FILE, open_pack, receive_delivery

    coordinator = coordinator_of(session)
    with open_pack(delivery, coordinator.files.root) as folder:
        if (folder / REQUEST_FILE).is_file():
            raise UserError(f"{delivery} is a pack for an owner; deliver the output of `expertctl federate work`")
        request, refusal = receive_delivery(coordinator, folder)
    if refusal is not None:
        raise UserError(f"the delivery of '{request.owner}' is refused: {refusal}")
    if request.recipe.round is not None:
        _deliver_into_round(session, coordinator, request)
        return
    expert = coordinator.files.ledger.states()[request.id].detail
    session.finish(
        {"request": request.id, "owner": request.owner, "expert": expert},
        f"the expert of '{request.owner}' is accepted: experts/{expert}",
    )


def _deliver_into_round(session: Session, coordinator: Coordinator, request: ExpertRequest) -> None:
    """Advance a shared model after an accepted delivery, and report its status."""
    from ...experts.federation.coordinator.round_keeper import advance, status_of

    round_ = request.recipe.round
    assert round_ is not None
    model = coordinator.shared_model(round_.model)
    messages = advance(coordinator, model)
    status = status_of(coordinator, model)
    session.finish(
        {"request": request.id, "owner": request.owner, "expert": None, "shared": asdict(status)},
        f"the weights of '{request.owner}' count in {round_}",
        *(messages or [shared_line(status)]),
    )
