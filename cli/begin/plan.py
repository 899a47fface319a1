"""`expertctl plan`: memory, time, traffic and cost of training by each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import Number, flag, fraction, integer, option, path
from ..output import Table

if TYPE_CHECKING:
    from ...experts.scaling.shape import ModelShape

Positive = Number(min=0, min_open=True)


@cli_command("plan", example="expertctl plan --size 7b --tokens 1e12 --hardware h100 --devices 64,512 --experts 8")
@option(
    "--size", "NAME", "A common size of model: 1b, 7b, 13b, 32b, 70b, tiny or small. Default: the workspace's seed."
)
@path("--model", "FOLDER", "Take the size from a Hugging Face model folder.")
@option("--tokens", "N", "Tokens of seed and experts together.", type=Positive, default=1e12)
@option("--batch-tokens", "N", "Tokens of an update of one model; experts share them.", type=Positive, default=4e6)
@integer("--length", "Tokens of a block.", default=4096)
@option("--hardware", "NAME", "Kind of device: v100, a100, h100, h200, b200, rtx4090.", default="h100")
@path("--hardware-file", "FILE", "YAML file that describes other kinds of device.", file=True)
@option("--devices", "N,N", "Numbers of devices.", default="8,64,512,4096")
@option(
    "--link",
    "NAME|GBIT",
    "Link of a node: internet, ethernet10, ethernet100, infiniband400, infiniband3200, or Gbit/s.",
    default="infiniband3200",
)
@integer("--experts", "Experts, or workers of DiLoCo.", default=8)
@fraction("--seed-share", "SHARE", "Share of the tokens that the seed is trained on.", allow_zero=True, default=0.5)
@fraction(
    "--finetune-share",
    "SHARE",
    "Share of the tokens that follow the merge of BTX and BTS.",
    allow_zero=True,
    default=0.1,
)
@integer("--sync-every", "Steps between exchanges of DiLoCo.", default=500)
@flag("--here", "Measure this machine, and predict steps of the model here by the workspace's settings; takes minutes.")
@pass_session
def command(session: Session, /, size: str | None, model: Path | None, here: bool, **settings: Any) -> None:
    """Compute memory, time, traffic and cost of training by each method.

    Nothing is trained. Hardware is described by its makers' figures and assumed shares of them; docs/scaling.md says
    which, and how far predictions for this machine were right.
    """
    if size is not None and model is not None:
        raise click.UsageError("give --size or --model, not both")
    shape = _shape(session, size, model)
    if here:
        _finish_here(session, shape)
        return
    _finish_plans(session, shape, settings)


def _shape(session: Session, size: str | None, model: Path | None) -> ModelShape:
    from ...experts.scaling.shape import folder_shape, named_shape

    if size is not None:
        return named_shape(size)
    return folder_shape(model if model is not None else session.open().layout.seed)


def _finish_plans(session: Session, shape: ModelShape, settings: Mapping[str, Any]) -> None:
    from ...experts.scaling.hardware import bandwidth_gbit, hardware
    from ...experts.scaling.methods import Scenario, plans

    given = dict(settings)
    kind = hardware(given.pop("hardware"), given.pop("hardware_file"))
    link, counts = bandwidth_gbit(given.pop("link")), _counts(given.pop("devices"))
    scenarios = [Scenario(shape, kind, count, link, **given) for count in counts]
    found = [plan for scenario in scenarios for plan in plans(scenario)]
    rows = [
        (
            plan.method,
            f"{plan.devices:,}",
            f"{plan.gb_per_device:,.0f}" + ("" if plan.fits else " (too much)"),
            f"{plan.days:,.1f}",
            f"{plan.busy:.0%}",
            f"{plan.node_terabytes:,.0f}",
            f"{plan.dollars:,.0f}",
        )
        for plan in found
    ]
    columns = ("method", "devices", "GB each", "days", "busy", "TB sent by a node", "dollars")
    title = f"{shape.parameters / 1e9:.2f} billion parameters, {given['tokens']:.3g} tokens, {given['experts']} experts, {kind.name}"
    table = Table(columns, rows, title, right=frozenset(range(1, len(columns))))
    session.finish({"shape": asdict(shape), "plans": [asdict(plan) for plan in found]}, table)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise click.BadParameter(f"'{text}' are no whole numbers above 0 with commas between", param_hint="--devices")
    return counts


def _finish_here(session: Session, shape: ModelShape) -> None:
    from ...core.config.phases import require_phases
    from ...experts.scaling.calibration import calibrated
    from ...experts.scaling.step_model import Workload

    training = session.open().config.training
    require_phases(training)
    with session.progress() as progress:
        model = calibrated(reporter=progress)
    batch_tokens = training.batch_size * training.sequence_length
    workloads = [(len(steps), Workload(shape, batch_tokens // length, length)) for steps, length in training.lengths]
    memory = max(model.peak_bytes(workload) for _, workload in workloads)
    total = training.accumulation * sum(count * model.step_seconds(workload) for count, workload in workloads)
    seconds, hours = total / training.steps, total / 3600
    session.finish(
        {
            "shape": asdict(shape),
            "step_seconds": seconds,
            "peak_bytes": memory,
            "hours": hours,
            "seconds_per_unit": dict(model.seconds),
            "bytes_per_unit": dict(model.bytes),
        },
        f"a step of {training.tokens_per_step:,} tokens takes {seconds:.2f} s on one core of this machine; "
        f"{training.tokens:,} tokens take {hours:,.1f} hours and {memory / 1e9:.1f} GB",
    )
