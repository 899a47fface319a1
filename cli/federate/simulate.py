"""`expertctl federate simulate`: simulation of a federation before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import Number, fraction, integer, option, path
from ..output import Table, number
from ..parsing import byte_count, optional_bytes, token_count

if TYPE_CHECKING:
    from ...experts.federation.simulation.planning import Report


@cli_command("simulate", example="expertctl federate simulate --owners 1000 --quorum 0.8 --deadline 48h")
@integer("--owners", "Number of owners to draw at random. Default: 100.")
@path(
    "--trace",
    "FILE",
    "Owners to simulate, in place of random ones: CSV or .jsonl with a row each; see docs/simulation.md.",
    file=True,
)
@fraction("--quorum", "SHARE", "Share of the owners whose experts the federation needs.", default=0.8)
@option("--deadline", "TIME", "Time until the deadline for deliveries: 30m, 48h, 2d.", default="48h")
@integer(
    "--ask-again",
    "Times that missing owners are asked again when the deadline passes without the quorum.",
    least=0,
    default=0,
)
@option("--tokens", "COUNT", "Tokens that each owner trains on.", type=token_count, default="100M")
@option("--expert-size", "SIZE", "Size of an expert.", type=byte_count, default="2GB")
@option(
    "--seed-size",
    "SIZE",
    "Size of the seed; 0 if all owners have it. Default: the size of an expert.",
    type=optional_bytes,
)
@option(
    "--line",
    "GBIT",
    "Bandwidth of the coordinator in each direction, Gbit/s.",
    type=Number(min=0, min_open=True),
    default=10.0,
)
@fraction(
    "--hostile",
    "SHARE",
    "Share of random owners whose delivery has to be refused. Default: 0.02.",
    allow_zero=True,
)
@fraction("--flapping", "SHARE", "Share of random owners that lose their connection every half hour.", allow_zero=True)
@integer("--seed", "Random seed.", least=0, default=0)
@pass_session
def simulate_command(
    session: Session,
    /,
    owners: int | None,
    trace: Path | None,
    quorum: float,
    deadline: str,
    ask_again: int,
    tokens: int,
    expert_size: int,
    seed_size: int | None,
    line: float,
    hostile: float | None,
    flapping: float | None,
    seed: int,
) -> None:
    """Simulate a federation: duration, traffic and failures.

    The coordinator is the real one, with its ledger, signatures and checks. Owners are modelled on a simulated clock, from a
    trace or drawn at random. They deliver stand-ins of a few bytes; times and traffic are computed for the sizes given. No
    workspace is needed.
    """
    from dataclasses import asdict

    from ...experts.federation.protocol.requests import deadline_in
    from ...experts.federation.simulation.events import BEGIN
    from ...experts.federation.simulation.owners import Plan, draw_owners, read_trace
    from ...experts.federation.simulation.planning import simulate

    if owners is not None and trace is not None:
        raise click.UsageError("--owners draws owners and --trace reads them; use only one of the two")
    if trace is not None and (hostile, flapping) != (None, None):
        raise click.UsageError("--hostile and --flapping apply to random owners; a trace says what each owner does")
    shares = {name: share for name, share in (("hostile", hostile), ("flapping", flapping)) if share is not None}
    simulated = read_trace(trace) if trace is not None else draw_owners(owners or 100, seed, **shares)
    plan = Plan(
        expert_bytes=expert_size,
        seed_bytes=expert_size if seed_size is None else seed_size,
        tokens=tokens,
        deadline=deadline_in(deadline, BEGIN) - BEGIN,
        quorum=quorum,
        line_gbit=line,
        ask_again=ask_again,
        seed=seed,
    )
    with session.progress() as reporter:
        report = simulate(simulated, plan, reporter=reporter)
    session.finish(asdict(report), *_tables(report))


def _tables(report: Report) -> tuple[str | Table, ...]:
    from rich.filesize import decimal

    refused = sum(report.refused.values())
    codes = ", ".join(f"{code} {count}" for code, count in report.refused.items())
    again = f", asked again {report.asked_again} times" if report.asked_again else ""
    rows = [
        ("quorum", f"{_hours(report.hours_to_quorum)}, {number(report.needed)} of {number(report.owners)}{again}"),
        ("all", _hours(report.hours_to_all)),
        ("accepted", number(report.accepted)),
        ("refused", f"{number(refused)}{f': {codes}' if codes else ''}"),
        ("late", number(report.late)),
        ("never", number(report.never)),
        ("downloaded", f"{decimal(report.bytes_down)}, link busy for {report.line_hours_down:.1f} h"),
        ("uploaded", f"{decimal(report.bytes_up)}, link busy for {report.line_hours_up:.1f} h"),
        ("of which lost", decimal(report.bytes_lost)),
        (
            "cost",
            f"{report.seconds:.0f} s ({report.cpu_seconds:.0f} s of CPU) for {number(report.events)} events, "
            f"{report.events_per_second:,.0f} a second, "
            f"peak memory {decimal(report.peak_memory_bytes)}",
        ),
    ]
    shares = Table(
        ("share of owners accepted", "after"), [(share, _hours(hours)) for share, hours in report.hours_to.items()]
    )
    return Table(("", ""), rows, headings=False), "", shares


def _hours(hours: float | None) -> str:
    return "not reached" if hours is None else f"{hours:.1f} h"
