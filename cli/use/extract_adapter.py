"""`expertctl extract-adapter`: a LoRA adapter out of two checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..output import Table


@cli_command("extract-adapter", example="expertctl extract-adapter law --base seed -o law-lora --rank 16")
@click.argument("model", metavar="MODEL")
@click.option("--base", required=True, metavar="MODEL", help="What MODEL was fine-tuned from.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where to."
)
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank of every matrix. Default: 16.")
@click.option(
    "--energy", type=float, metavar="SHARE", help="Instead: as many singular values as hold this share."
)
@click.option(
    "--targets",
    default="*",
    show_default=True,
    metavar="PATTERN",
    help="Which linear layers, by tensor name.",
)
@click.option("--save-rest", is_flag=True, help="Keep whatever else changed whole, in the adapter.")
@click.option("--dtype", default="float32", show_default=True, metavar="DTYPE", help="What to write.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@pass_session
def command(
    session: Session,
    model: str,
    base: str,
    output: Path,
    rank: int | None,
    energy: float | None,
    targets: str,
    save_rest: bool,
    dtype: str,
    force: bool,
) -> None:
    """Write a PEFT LoRA adapter that turns the base into MODEL.

    Every linear layer that changed gets the truncated singular value decomposition of its change; what that loses
    is told for each and over all.
    """
    from ...core.artefacts.numeric import dtype_of_word
    from ...merge.extraction import extract_adapter

    with session.count("extracting", "matrices") as count:
        report = extract_adapter(
            session.artefact(base),
            session.artefact(model),
            output,
            rank=16 if rank is None and energy is None else rank,
            energy=energy,
            targets=targets,
            save_rest=save_rest,
            dtype=dtype_of_word(dtype),
            force=force,
            tell=count.to,
        )
    rows = [(one.name, str(one.rank), f"{one.error:.2%}") for one in report.tensors]
    parts: list[str | Table] = [Table(("matrix", "rank", "lost"), rows, right=frozenset({1, 2}))]
    if report.saved_whole:
        parts.append(f"saved whole: {', '.join(report.saved_whole)}")
    if report.left_out:
        parts.append(f"changed, and not in the adapter: {', '.join(report.left_out)}; --save-rest keeps them")
    parts.append(f"adapter in {output}: {len(rows)} matrices, {report.error:.2%} of the change is lost")
    session.finish({"folder": str(output), **asdict(report)}, *parts)
