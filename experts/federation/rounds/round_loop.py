"""Rounds of a shared model in one process: every owner trains in turn, then the round is closed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ....core.errors import Interrupted, UserError
from .round_plan import RoundReport
from .rounds import Rounds


@dataclass(frozen=True)
class OwnerTask:
    """What one owner is to do in one round."""

    owner: str
    round: int
    shared: Path
    """Safetensors file of the weights to start from, or a folder with them in shards."""
    result: Path
    """Safetensors file to write: the same tensors after training."""


TrainOwner = Callable[[OwnerTask], int]
"""Trains one owner's weights into `task.result` and returns the tokens of the owner's text. Called again for the same task after
a kill, it must give the same bytes. Raises `UserError` where the owner cannot deliver, who is then left out of the round."""


def run_rounds(
    rounds: Rounds,
    train_owner: TrainOwner,
    total: int,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    say: Callable[[str], None] = lambda line: None,
) -> list[RoundReport]:
    """Go on with rounds until `total` of them are closed, and return how each ended.

    Stopped at any point and called again, it ends in the same bytes. Raises `UserError` for a round with too few owners; called
    again, it lets those who were left out try once more.
    """
    rounds.tidy()  # what a kill left
    if rounds.number < total and rounds.state(now()) == "short":
        rounds.ask_again()
    while rounds.number < total:
        if not rounds.is_closing:
            for owner in rounds.missing():
                if now() >= rounds.deadline:
                    break
                _train(rounds, owner, train_owner, now, say)
        report = rounds.close(now())
        say(f"round {report.number}: {len(report.shares)} of {len(rounds.plan.owners)} owners averaged")
    return [rounds.report(number) for number in range(total)]


def _train(
    rounds: Rounds,
    owner: str,
    train_owner: TrainOwner,
    now: Callable[[], datetime],
    say: Callable[[str], None],
) -> None:
    work = rounds.work_folder(owner)
    task = OwnerTask(owner, rounds.number, rounds.shared, work / "result.safetensors")
    try:
        tokens = train_owner(task)
    except Interrupted:
        raise
    except UserError as error:
        rounds.leave_out(owner, "TRAINING", str(error))
        say(f"'{owner}' is left out of round {task.round}: {error}")
        return
    refusal = rounds.deliver(owner, task.result, tokens, now())
    if refusal is not None:
        say(f"'{owner}' is left out of round {task.round}: {refusal}")
