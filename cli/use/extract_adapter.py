"""`expertctl extract-adapter`: extract a LoRA adapter from two checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, integer, option, path
from ..output import Table


@cli_command("extract-adapter", example="expertctl extract-adapter law --base seed -o law-lora --rank 16")
@click.argument("model", metavar="MODEL")
@option("--base", "MODEL", "Model that MODEL was fine-tuned from.", required=True)
@path("-o, --output", "DIR", "Output folder.", required=True)
@integer("--rank", "Rank of all matrices. Default: 16.")
@option(
    "--energy", "SHARE", "Instead of --rank: keep singular values up to this share of their squared sum.", type=float
)
@option("--targets", "PATTERN", "Linear layers to adapt, by tensor name.", default="*")
@flag("--save-rest", "Store all other changed tensors in full in the adapter.")
@option("--dtype", "DTYPE", "Dtype of the adapter.", default="float32")
@flag("--force", "Replace existing output.")
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

    The change of every linear layer is approximated by its truncated singular value decomposition. The table lists the
    approximation error of each matrix.
    """
    from ...core.artefacts.numeric import dtype_of_word
    from ...merge.extraction import extract_adapter

    with session.progress() as reporter:
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
            reporter=reporter,
        )
    rows = [(matrix.name, str(matrix.rank), f"{matrix.error:.2%}") for matrix in report.tensors]
    parts: list[str | Table] = [Table(("matrix", "rank", "error"), rows, right=frozenset({1, 2}))]
    if report.saved_whole:
        parts.append(f"stored in full: {', '.join(report.saved_whole)}")
    if report.left_out:
        parts.append(f"changed, but not in the adapter: {', '.join(report.left_out)}; use --save-rest to include them")
    parts.append(f"adapter in {output}: {len(rows)} matrices, relative error {report.error:.2%}")
    session.finish({"folder": str(output), **asdict(report)}, *parts)
