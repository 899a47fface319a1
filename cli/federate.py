"""`expertctl federate`: data owners who hand in experts and keep their text."""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import UserError
from .context import Session, pass_session
from .federate_simulate import simulate_command
from .group import Group, cli_command
from .output import Table, number, short
from .parsing import as_dictionary, setting

if TYPE_CHECKING:
    from ..experts.federation.coordinator import Coordinator, OwnerStatus
    from ..experts.federation.owner import Owner, Review
    from ..experts.federation.requests import Recipe

STATE_FOLDER = Path("expertctl") / "owner"
WATCH_SECONDS = 2.0


NETWORK = ("serve", "ask", "join")


class FederateGroup(Group):
    """The commands for a network stand in a file of their own, which is imported when one of them is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *NETWORK]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in NETWORK:
            return super().get_command(ctx, name)
        from . import federate_network

        found: click.Command = getattr(federate_network, name)
        return found


@click.group("federate", cls=FederateGroup)
def command() -> None:
    """Let data owners train experts on text that stays with them, and merge what they hand in.

    The coordinator has the workspace with the seed; each owner has a key, text, and a state folder of its own.
    """


def default_state() -> Path:
    """Return where an owner's state is kept unless another folder is named."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / STATE_FOLDER


state_option = click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The owner's state folder. Default: ~/.local/state/expertctl/owner",
)
force_option = click.option("--force", is_flag=True, help="Replace what is there.")

recipe_options = [
    click.option(
        "--recipe",
        "recipe_name",
        default="flexolmo",
        show_default=True,
        metavar="NAME",
        help="flexolmo (a feed-forward beside the frozen public one), btm (the whole model), or a trainer.",
    ),
    click.option(
        "--tokens", type=click.IntRange(min=1), metavar="N", help="Tokens that each expert trains on."
    ),
    click.option(
        "--set",
        "settings",
        type=setting,
        multiple=True,
        metavar="KEY=VALUE",
        help="A setting of the training.",
    ),
    click.option(
        "--option",
        "options",
        type=setting,
        multiple=True,
        metavar="KEY=VALUE",
        help="An option of the trainer.",
    ),
    click.option(
        "--dp",
        metavar="epsilon=E,delta=D",
        help="Ask for training with differential privacy, and refuse what spent more.",
    ),
    click.option(
        "--deadline",
        default="14d",
        show_default=True,
        metavar="TIME",
        help="Time until the deadline: 48h, 14d.",
    ),
]


def with_recipe(function: click.decorators.FC) -> click.decorators.FC:
    """Add the options that say what is asked for."""
    for option in reversed(recipe_options):
        function = option(function)
    return function


def recipe_from(
    recipe_name: str,
    tokens: int | None,
    settings: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    dp: str | None,
) -> Recipe:
    """Return the recipe that the options of `with_recipe` describe."""
    from ..experts.federation.recipes import recipe_of

    training = as_dictionary((*settings, *((("tokens", tokens),) if tokens is not None else ())))
    privacy = as_dictionary(setting(part) for part in dp.split(",")) if dp is not None else None
    return recipe_of(recipe_name, as_dictionary(options), training, privacy)


def coordinator_of(session: Session) -> Coordinator:
    """Return the coordinator of the workspace at hand."""
    from ..experts.federation.coordinator import Coordinator
    from ..experts.federation.held_out import held_out_measure

    layout = session.open().layout
    return Coordinator(layout, measure=held_out_measure(layout))


@cli_command("keys", example="expertctl federate keys")
@state_option
@pass_session
def keys(session: Session, state: Path | None) -> None:
    """Make an owner's pair of keys; the public part goes to the coordinator.

    A pair that is there already is shown and stays.
    """
    from ..experts.federation.keys import KEY_FILE, PUBLIC_FILE, make_key, read_key

    folder = state or default_state()
    key = read_key(folder) if (folder / KEY_FILE).exists() else make_key(folder)
    content = {
        "private": str(key.path),
        "public": str(folder / PUBLIC_FILE),
        "line": key.public.line,
        "fingerprint": key.public.fingerprint,
    }
    session.finish(
        content,
        f"give this file to the coordinator: {folder / PUBLIC_FILE}",
        f"fingerprint: {key.public.fingerprint}",
    )


@cli_command("invite", example="expertctl federate invite site-a.pub --name site-a")
@click.argument("public", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--name", required=True, metavar="NAME", help="What the owner is called here.")
@pass_session
def invite(session: Session, public: Path, name: str) -> None:
    """Invite an owner by the public part of its key."""
    from ..experts.federation.keys import PublicKey

    if not public.is_file():
        raise UserError(f"{public} does not exist; the owner makes it with `expertctl federate keys`")
    member = coordinator_of(session).members.add(name, PublicKey.read(public))
    session.finish(
        {"name": member.name, "fingerprint": member.key.fingerprint},
        f"'{member.name}' is invited: {member.key.fingerprint}",
    )


@cli_command("remove", example="expertctl federate remove site-a")
@click.argument("name", metavar="NAME")
@pass_session
def remove(session: Session, name: str) -> None:
    """Take an owner out of the federation; experts that were accepted stay."""
    coordinator_of(session).members.remove(name)
    session.finish({"removed": name}, f"'{name}' is no member any more; what was accepted from it stays")


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
@force_option
@pass_session
def pack(
    session: Session,
    /,
    name: str,
    output: Path,
    without_seed: bool,
    force: bool,
    deadline: str,
    **recipe: Any,
) -> None:
    """Ask an owner for an expert by a folder or file that is carried there."""
    from datetime import UTC

    from ..experts.federation.packs import write_pack
    from ..experts.federation.requests import deadline_in

    coordinator = coordinator_of(session)
    asked = coordinator.ask([name], recipe_from(**recipe), deadline_in(deadline, datetime.now(UTC)))
    if not asked:
        raise UserError(f"'{name}' has delivered what this recipe asks for; ask for another recipe")
    write_pack(coordinator, asked[0], output, with_seed=not without_seed, force=force)
    session.finish(
        {
            "request": asked[0].id,
            "owner": name,
            "output": str(output),
            "deadline": asked[0].deadline.isoformat(),
        },
        f"request {asked[0].id} for '{name}' is in {output}, until {asked[0].deadline:%Y-%m-%d %H:%M} UTC",
        f"there: expertctl federate work {output.name} --data FOLDER -o delivery.tar",
    )


@cli_command("work", example="expertctl federate work for-site-a.tar --data ./private -o delivery.tar")
@click.argument("pack_path", metavar="PACK", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="PATH", help="Your text: a folder or a file."
)
@click.option(
    "--text-field", default="text", show_default=True, metavar="NAME", help="Field that holds the text."
)
@click.option("--licence", metavar="TEXT", help="Under which licence the text stands; told with the expert.")
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
@state_option
@force_option
@pass_session
def work(
    session: Session,
    pack_path: Path,
    data: Path | None,
    text_field: str,
    licence: str | None,
    seed: Path | None,
    output: Path,
    review: bool,
    yes: bool,
    state: Path | None,
    force: bool,
) -> None:
    """Train what a pack asks for, next to your text, and write what goes back.

    Stopped at any point, the same command goes on. Before anything is written for the coordinator you are shown what it
    is, and asked.
    """
    from ..core.files import refuse_existing
    from ..experts.federation.owner import Owner, OwnerSettings
    from ..experts.federation.packs import SEED_FOLDER, opened, read_request, write_delivery

    refuse_existing(output, force=force, what="delivery")
    owner = Owner(state or default_state())
    owner.key()
    if data is not None:
        owner.configure(OwnerSettings(data, text_field, licence))
    owner.settings()
    with opened(pack_path, owner.state) as folder:
        request = read_request(folder)
        owner.take(request)
        if not owner.has_seed(request):
            source = seed or folder / SEED_FOLDER
            if not source.is_dir():
                raise UserError("the pack has no seed; name its folder with --seed")
            owner.use_seed(request, source)
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

    from ..experts.federation.progress import Progress
    from ..experts.federation.work import work as train

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


def agree(session: Session, review: Review, *, whole: bool, yes: bool) -> None:
    """Show an owner what would leave and wait for a yes; raises `UserError` for anything else."""
    if yes and not whole:
        return
    for line in review_lines(review, whole=whole):
        click.echo(line, err=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(
            "nothing leaves without your yes, and there is nobody to ask; look at --review, then use --yes"
        )
    if not click.confirm("Let this leave?", err=True):
        raise UserError("nothing has left; the expert stays in your state folder")


def review_lines(review: Review, *, whole: bool) -> list[str]:
    """Return what an owner is shown before anything leaves."""
    from .output import plain_table

    domains = review.data.get("domains", {})
    lines = [
        f"request {review.request.id}: {review.request.recipe.trains} for seed {short(review.request.seed)}"
    ]
    for about in domains.values():
        lines.append(
            f"told of your text: about {number(about['documents'])} documents, {number(about['tokens'])} tokens, "
            f"{number(about['bytes'])} bytes; licence {about.get('licence') or 'not said'}"
        )
    spent = review.privacy
    lines.append(
        f"privacy spent: epsilon {spent['epsilon']:g}, delta {spent['delta']:g}"
        if spent is not None
        else "privacy: trained without noise; what the weights remember can be drawn out (see `expertctl audit extraction`)"
    )
    if whole:
        rows = [
            (name, dtype, "x".join(map(str, shape)), number(size), short(digest))
            for name, dtype, shape, size, digest in review.tensors
        ]
        lines += plain_table(
            Table(("tensor", "dtype", "shape", "bytes", "digest"), rows, right=frozenset({3}))
        ).splitlines()
    lines.append(
        f"{len(review.tensors)} tensors in {number(sum(review.files.values()))} bytes: {', '.join(review.files)}"
    )
    return lines


def review_content(review: Review) -> dict[str, Any]:
    """Return what `--json` says of a delivery."""
    return {
        "files": dict(review.files),
        "tensors": {
            name: {"dtype": dtype, "shape": list(shape), "bytes": size, "digest": digest}
            for name, dtype, shape, size, digest in review.tensors
        },
        "data": dict(review.data),
        "privacy": dict(review.privacy) if review.privacy is not None else None,
    }


@cli_command("deliver", example="expertctl federate deliver delivery.tar")
@click.argument("delivery", metavar="DELIVERY", type=click.Path(path_type=Path))
@pass_session
def deliver(session: Session, delivery: Path) -> None:
    """Take in what an owner has sent as a folder or file.

    Every check that can be made without the owner's text is made first. A delivery that is refused is put apart with the reason, and the command exits 1.
    """
    from ..experts.federation.packs import hand_in, opened

    coordinator = coordinator_of(session)
    with opened(delivery, coordinator.root) as folder:
        request, refusal = hand_in(coordinator, folder)
    if refusal is not None:
        raise UserError(f"the delivery of '{request.owner}' is refused: {refusal}")
    expert = coordinator.ledger.states()[request.id].detail
    session.finish(
        {"request": request.id, "owner": request.owner, "expert": expert},
        f"the expert of '{request.owner}' is accepted: experts/{expert}",
    )


@cli_command("status", example="expertctl federate status --watch")
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until Ctrl-C.")
@pass_session
def status(session: Session, watch: bool) -> None:
    """Show how every owner stands: asked, training, accepted, or refused and why."""
    coordinator = coordinator_of(session)
    while True:
        found = coordinator.status()
        if watch and sys.stdout.isatty():
            click.clear()
        session.finish({"owners": [_status_content(one) for one in found]}, _status_table(found))
        if not watch:
            return
        time.sleep(WATCH_SECONDS)


def _status_table(found: list[OwnerStatus]) -> Table | str:
    if not found:
        return "nobody is invited yet: expertctl federate invite FILE.pub --name NAME"
    rows = []
    for one in found:
        progress, training = one.progress, ""
        if one.state != "accepted" and progress is not None:
            from ..core.progress import duration

            training = progress.state if progress.state != "failed" else f"failed ({progress.code})"
            if progress.state == "training":
                training = f"step {number(progress.step)} of {number(progress.steps)}"
                training += f", loss {progress.loss:.2f}" if progress.loss is not None else ""
                training += (
                    f", {duration(progress.seconds_left)} left" if progress.seconds_left is not None else ""
                )
        rows.append(
            (
                one.name,
                one.state or "invited",
                training,
                f"{one.seen:%Y-%m-%d %H:%M}" if one.seen is not None else "",
                f"{one.deadline:%Y-%m-%d %H:%M}" if one.deadline is not None else "",
                one.detail,
            )
        )
    return Table(("owner", "state", "training", "last heard", "deadline", "detail"), rows)


def _status_content(one: OwnerStatus) -> dict[str, Any]:
    return {
        "owner": one.name,
        "request": one.request,
        "state": one.state,
        "detail": one.detail,
        "progress": one.progress.as_json() if one.progress is not None else None,
        "last_heard": one.seen.isoformat() if one.seen is not None else None,
        "deadline": one.deadline.isoformat() if one.deadline is not None else None,
    }


for _one in (keys, invite, remove, pack, work, deliver, status, simulate_command):
    command.add_command(_one)
