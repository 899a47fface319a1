"""`expertctl federate pack`, `work` and `deliver`: a federation by folders and files that are carried."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import cli_command
from .options import coordinator_of, force_option, owner_from, recipe_from, with_owner, with_recipe
from .review import agree, review_content
from .shared import shared_content, shared_line

if TYPE_CHECKING:
    from ...experts.federation.coordinator.coordinator import Coordinator
    from ...experts.federation.owner.owner import Owner
    from ...experts.federation.protocol.requests import ExpertRequest


@cli_command(
    "pack", example="expertctl federate pack site-a --recipe flexolmo --tokens 2000000 -o for-site-a.tar"
)
@click.argument("name", metavar="NAME")
@with_recipe
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A folder, or a file that ends in .tar.",
)
@click.option("--without-seed", is_flag=True, help="The owner has the seed already.")
@click.option(
    "--shared",
    metavar="MODEL",
    help="The open round of a shared model that `ask` has begun, in place of an expert.",
)
@force_option
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
    """Ask an owner for an expert by a folder or file that is carried there."""
    from ...experts.federation.packs import write_pack

    coordinator = coordinator_of(session)
    asked = (
        _asked(coordinator, name, deadline, recipe)
        if shared is None
        else _open_round(coordinator, name, shared)
    )
    write_pack(coordinator, asked, output, with_seed=not without_seed, force=force)
    session.finish(
        {"request": asked.id, "owner": name, "output": str(output), "deadline": asked.deadline.isoformat()},
        f"request {asked.id} for '{name}' is in {output}, until {asked.deadline:%Y-%m-%d %H:%M} UTC",
        f"there: expertctl federate work {output.name} --data FOLDER -o delivery.tar",
    )


def _asked(coordinator: Coordinator, name: str, deadline: str, recipe: dict[str, Any]) -> ExpertRequest:
    from datetime import UTC

    from ...experts.federation.protocol.requests import deadline_in
    from ...experts.federation.rounds.averaging import OUTER_RECIPES

    if recipe["recipe_name"] in OUTER_RECIPES:
        raise UserError(
            f"rounds are begun with `expertctl federate ask --recipe {recipe['recipe_name']}`; then pack the open one with "
            "--shared MODEL"
        )
    asked = coordinator.ask([name], recipe_from(**recipe), deadline_in(deadline, datetime.now(UTC)))
    if not asked:
        raise UserError(f"'{name}' has delivered what this recipe asks for; ask for another recipe")
    return asked[0]


def _open_round(coordinator: Coordinator, name: str, shared: str) -> ExpertRequest:
    """Return what an owner is asked for in the open round of a shared model."""
    from ...experts.federation.coordinator.round_keeper import advance
    from ...experts.federation.rounds.shared_model import shared_model

    coordinator.members.named(name)
    model = shared_model(coordinator.shared_root, shared)
    advance(coordinator, model)
    for request in coordinator.open_requests(name):
        if request.recipe.round is not None and request.recipe.round.model == shared:
            return request
    raise UserError(
        f"nothing of '{shared}' is open for '{name}': it has delivered, is no owner of it, or the deadline has passed; see "
        "`expertctl federate status`"
    )


@cli_command("work", example="expertctl federate work for-site-a.tar --data ./private -o delivery.tar")
@click.argument("pack_path", metavar="PACK", type=click.Path(path_type=Path))
@with_owner
@click.option(
    "--seed",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The seed, where the pack has none.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="What goes to the coordinator: a folder, or a file that ends in .tar.",
)
@click.option("--review", is_flag=True, help="Show every tensor that would leave, then ask.")
@click.option("--yes", is_flag=True, help="Write the delivery without asking.")
@force_option
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
    """Train what a pack asks for, next to your text, and write what goes back.

    Stopped at any point, the same command goes on. Before anything is written for the coordinator you are shown what it
    is, and asked.
    """
    from ...core.artefacts.files import refuse_existing
    from ...experts.federation.packs import SEED_FOLDER, opened, read_request, write_delivery

    refuse_existing(output, force=force, what="delivery")
    owner = owner_from(**owner_options)
    with opened(pack_path, owner.state) as folder:
        request = read_request(folder)
        owner.take(request)
        owner.drop_superseded()
        if not owner.seeds.has(request):
            source = seed or folder / SEED_FOLDER
            if not source.is_dir():
                raise UserError("the pack has no seed; name its folder with --seed")
            owner.seeds.use(request, source)
    _train(session, owner, request.id)
    found = owner.review(request.id)
    agree(session, found, whole=review, yes=yes)
    write_delivery(owner.delivery_folder(request.id), output, force=force)
    session.finish(
        {"request": request.id, "output": str(output), **review_content(found)},
        f"the expert is in {output}; hand it to the coordinator: expertctl federate deliver {output.name}",
    )


def _train(session: Session, owner: Owner, identifier: str) -> None:
    """Train in this process, showing how far it is; Ctrl-C leaves a checkpoint."""
    import signal
    import threading

    from ...experts.federation.owner.work import work as train
    from ...experts.federation.protocol.progress import Progress

    stop = threading.Event()
    previous = {one: signal.signal(one, lambda *_: stop.set()) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        with session.count("training", "steps") as count:

            def tell(progress: Progress) -> None:
                count.total = progress.steps or None
                count.to(progress.step)

            train(owner, identifier, tell, stop.is_set)
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


@cli_command("deliver", example="expertctl federate deliver delivery.tar")
@click.argument("delivery", metavar="DELIVERY", type=click.Path(path_type=Path))
@pass_session
def deliver(session: Session, delivery: Path) -> None:
    """Take in what an owner has sent as a folder or file.

    Every check that can be made without the owner's text is made first. A delivery that is refused is put apart with the reason, and the command exits 1.
    """
    from ...experts.federation.packs import REQUEST_FILE, hand_in, opened

    coordinator = coordinator_of(session)
    with opened(delivery, coordinator.root) as folder:
        if (folder / REQUEST_FILE).is_file():
            raise UserError(
                f"{delivery} is a pack for an owner; deliver what `expertctl federate work` has written"
            )
        request, refusal = hand_in(coordinator, folder)
    if refusal is not None:
        raise UserError(f"the delivery of '{request.owner}' is refused: {refusal}")
    if request.recipe.round is not None:
        _deliver_into_round(session, coordinator, request)
        return
    expert = coordinator.ledger.states()[request.id].detail
    session.finish(
        {"request": request.id, "owner": request.owner, "expert": expert},
        f"the expert of '{request.owner}' is accepted: experts/{expert}",
    )


def _deliver_into_round(session: Session, coordinator: Coordinator, request: ExpertRequest) -> None:
    """Say that an owner's weights count, and what that was the last thing missing for."""
    from ...experts.federation.coordinator.round_keeper import advance, status_of
    from ...experts.federation.rounds.shared_model import shared_model

    part = request.recipe.round
    assert part is not None
    model = shared_model(coordinator.shared_root, part.model)
    said = advance(coordinator, model)
    found = status_of(coordinator, model)
    session.finish(
        {"request": request.id, "owner": request.owner, "expert": None, "shared": shared_content(found)},
        f"the weights of '{request.owner}' count in {part}",
        *(said or [shared_line(found)]),
    )
