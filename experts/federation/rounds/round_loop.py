"""Rounds of a shared model in one process: owners train one after another, then the round is closed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ....core.errors import Interrupted, UserError
from ....core.reporting import SILENT, Reporter
from .rounds import RoundReport, Rounds


@dataclass(frozen=True)
class OwnerTask:
    """Training task of one owner in one round."""

    owner: str
    round: int
    shared: Path
    """Initial weights: a safetensors file, or a folder with shards."""
    result: Path
    """Safetensors file to write, with the same tensors after training."""


TrainOwner = Callable[[OwnerTask], int]
"""Trains one owner, writes `task.result` and returns the token count of the owner's text. Repeated after a kill, it must write the
same bytes. A `UserError` leaves the owner out of the round."""


def run_rounds(
    rounds: Rounds,
    train_owner: TrainOwner,
    total: int,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    reporter: Reporter = SILENT,
) -> list[RoundReport]:
    """Run rounds until `total` of them are closed, and return their reports.

    Stopped at any point and called again, it gives the same bytes. Raises `UserError` for a round with too few owners; the next
    call lets the owners left out try again.
    """
    rounds.tidy()  # a kill may have interrupted the cleanup
    if rounds.number < total and rounds.state(now()) == "short":
        rounds.readmit_owners()
    while rounds.number < total:
        if not rounds.is_closing:
            for owner in rounds.missing():
                if now() >= rounds.open.deadline:
                    break
                _train(rounds, owner, train_owner, now, reporter)
        report = rounds.close(now())
        reporter.say(f"round {report.number}: {len(report.shares)} of {len(rounds.plan.owners)} owners averaged")
    return [rounds.report(number) for number in range(total)]


def _train(
    rounds: Rounds, owner: str, train_owner: TrainOwner, now: Callable[[], datetime], reporter: Reporter
) -> None:
    open_round = rounds.open
    work = open_round.folder / "work" / owner  # deleted when the round is closed
    work.mkdir(parents=True, exist_ok=True)
    task = OwnerTask(owner, open_round.number, open_round.shared, work / "result.safetensors")
    try:
        tokens = train_owner(task)
    except Interrupted:
        raise
    except UserError as error:
        rounds.leave_out(owner, "TRAINING", str(error))
        reporter.say(f"'{owner}' is left out of round {task.round}: {error}")
        return
    refusal = rounds.deliver(owner, task.result, tokens, now())
    if refusal is not None:
        reporter.say(f"'{owner}' is left out of round {task.round}: {refusal}")
