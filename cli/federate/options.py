"""Options and helpers shared by the commands of `expertctl federate`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ..context import Session
from ..options import integer, option, pairs, path, training_settings, with_options
from ..parsing import settings as key_values

if TYPE_CHECKING:
    from ...experts.federation.coordinator.coordinator import Coordinator
    from ...experts.federation.owner.owner import Owner
    from ...experts.federation.protocol.requests import Recipe


def default_state() -> Path:
    """Return the default state folder of an owner."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "expertctl" / "owner"


state_option = path("--state", "DIR", "The owner's state folder. Default: ~/.local/state/expertctl/owner")
with_owner = with_options(
    path("--data", "PATH", "Your text: a folder or a file. Required the first time."),
    option("--text-field", "NAME", "Field that holds the text.", default="text"),
    option("--licence", "TEXT", "Licence of the text; recorded in the expert's manifest."),
    option(
        "--dp",
        "epsilon=E,delta=D",
        "Always train with differential privacy, even if a request does not ask for it; stored. `none` removes it.",
    ),
    state_option,
)
"""Options of an owner's settings."""
with_recipe = with_options(
    option(
        "--recipe",
        "NAME",
        "flexolmo (an FFN beside the frozen public one), btm (the whole model), lora (an adapter), another trainer, or "
        "diloco or fedavg (one shared model, in rounds).",
        name="recipe_name",
        default="flexolmo",
    ),
    integer("--tokens", "Tokens that each owner trains on (over all rounds)."),
    pairs("--set", "settings", "Training setting."),
    pairs("--option", "options", "Trainer option."),
    option("--dp", "epsilon=E,delta=D", "Request differential privacy, and refuse experts that spent more."),
    option("--deadline", "TIME", "Time until the deadline (of each round): 48h, 14d.", default="14d"),
)
"""Options of a request's recipe."""


def owner_from(data: Path | None, text_field: str, licence: str | None, dp: str | None, state: Path | None) -> Owner:
    """Return an owner with the options of `with_owner` stored; omitted options keep their stored values."""
    from dataclasses import replace

    from ...experts.federation.owner.owner import Owner, OwnerSettings

    owner = Owner((state or default_state()).expanduser().resolve())
    owner.key()
    settings = owner.settings() if data is None else OwnerSettings(data, text_field, licence)
    if data is not None and owner.is_configured:
        settings = replace(settings, privacy=owner.settings().privacy)
    if dp is not None:
        settings = replace(settings, privacy=None if dp == "none" else privacy_from(dp))
    owner.configure(settings)
    return owner


def privacy_from(text: str) -> dict[str, Any]:
    """Parse `--dp`; raises `UserError` for a malformed value."""
    try:
        return key_values(text)
    except click.BadParameter as error:
        raise UserError(f"--dp: {error.message}; write epsilon=8,delta=1e-6") from None


def recipe_from(
    recipe_name: str, tokens: int | None, settings: dict[str, Any], options: dict[str, Any], dp: str | None
) -> Recipe:
    """Return the recipe for the options of `with_recipe`."""
    from ...experts.federation.owner.recipes import recipe_of

    privacy = privacy_from(dp) if dp is not None else None
    return recipe_of(recipe_name, options, training_settings(tokens, settings), privacy)


def coordinator_of(session: Session) -> Coordinator:
    """Return the coordinator of the current workspace."""
    from ...experts.federation.coordinator.coordinator import Coordinator
    from ...experts.federation.judging.judges import Judges

    layout = session.open().layout
    judges = Judges(layout)
    return Coordinator(layout, measure=judges, judged_at_once=judges.count)


@contextmanager
def stopped_by_signals(patience_s: float | None = None) -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set; with `patience_s`, the process exits if the block goes on for so long after it."""
    stop = threading.Event()
    timers: list[threading.Timer] = []

    def request_stop(*_: object) -> None:
        stop.set()
        if patience_s is not None and not timers:
            timers.append(threading.Timer(patience_s, _exit_now))
            timers[0].daemon = True
            timers[0].start()

    with handled_signals(request_stop, signal.SIGINT, signal.SIGTERM):
        try:
            yield stop
        finally:
            for timer in timers:
                timer.cancel()


def _exit_now() -> None:
    """Exit although the other side has not answered; all state is on disk."""
    os.write(2, b"stopped while waiting for an answer; the same command goes on\n")
    os._exit(1)


@contextmanager
def handled_signals(handler: Callable[[int, FrameType | None], object], *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals with another function within the block."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)
