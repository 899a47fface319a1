"""`expertctl audit`: what a model gives away of the text it was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import Group, cli_command
from ..output import Table, number

if TYPE_CHECKING:
    from ...experts.measures.extraction_audit import Extraction, ExtractionAudit

GATE_FAILED = 3
POSITIVE = click.IntRange(min=1)


@click.group("audit", cls=Group)
def command() -> None:
    """Look for what a model gives away of its training text.

    For the owner of the text, next to the text: nothing but counts is printed.
    """


@cli_command(
    "extraction", example="expertctl audit extraction clinic --data clinic --against seed --documents 500"
)
@click.argument("model", metavar="EXPERT")
@click.option(
    "--data",
    required=True,
    metavar="DOMAIN|PATH",
    help="Text that it was trained on: a domain, whose training part is taken, or a file or folder.",
)
@click.option(
    "--text-field",
    default="text",
    show_default=True,
    metavar="NAME",
    help="Where a file at PATH has its text.",
)
@click.option(
    "--against", metavar="MODEL", help="Attack this one too, which has not seen the text: the seed."
)
@click.option(
    "--documents", type=POSITIVE, default=1000, show_default=True, metavar="N", help="Most documents to try."
)
@click.option(
    "--prefix",
    type=POSITIVE,
    default=32,
    show_default=True,
    metavar="N",
    help="Tokens that the model is given.",
)
@click.option(
    "--continuation",
    type=POSITIVE,
    default=256,
    show_default=True,
    metavar="N",
    help="Tokens that it is to give back.",
)
@click.option(
    "--samples", type=POSITIVE, default=10, show_default=True, metavar="N", help="Tries for each document."
)
@click.option("--top-k", type=POSITIVE, default=50, show_default=True, metavar="K", help="Of the sampling.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    metavar="P",
    help="Of the sampling.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="T",
    help="Of the sampling.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    metavar="S",
    help="Similarity from which on a document counts as extracted.",
)
@click.option(
    "--batch-size",
    type=POSITIVE,
    default=40,
    show_default=True,
    metavar="N",
    help="Continuations at a time: memory and speed; other samples with another one.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Random seed."
)
@click.option(
    "--at-most",
    type=click.FloatRange(0, 1),
    metavar="RATE",
    help="Exit with status 3 unless the upper end of the interval is at most this.",
)
@pass_session
def extraction(
    session: Session,
    /,
    model: str,
    data: str,
    text_field: str,
    against: str | None,
    at_most: float | None,
    **settings: Any,
) -> int:
    """Try to get training documents back out of a model.

    It is given the first tokens of a document and samples what follows. Extracted is what comes within a
    normalised Levenshtein similarity, over tokens, of the true continuation.
    """
    folder = session.artefact(model)
    reference = session.artefact(against) if against is not None else None
    documents = _documents(session, data, text_field)
    from ...experts.measures.extraction_audit import AttackSettings, audit_extraction

    with session.count("attacking", "documents") as count:

        def tell(name: str, done: int, total: int) -> None:
            count.total = total
            count.to(done, name)

        found = audit_extraction(
            folder, documents, AttackSettings(**settings), reference=reference, tell=tell
        )
    session.finish(found.as_json(), _table(found), "", *_notes(found))
    low, high = found.model.interval
    if at_most is not None and high > at_most:
        click.echo(
            f"Error: the rate is {found.model.rate:.4f}, between {low:.4f} and {high:.4f}, and may be above {at_most:g}",
            err=True,
        )
        return GATE_FAILED
    return 0


def _documents(session: Session, data: str, text_field: str) -> Iterable[str]:
    """Return the documents of a domain's training part, or of a file or folder."""
    from ...core.errors import unknown_name
    from ...experts.text.corpora import domain_documents, read_documents

    layout = session.layout()
    domains = session.open().config.domains if layout is not None else {}
    if layout is not None and data in domains:
        return domain_documents(domains[data], layout.root, "train")
    path = Path(data).expanduser()
    if not path.exists():
        raise unknown_name("domain or path", data, domains, listed_as="expertctl.yaml has")
    return read_documents(path, text_field)


def _table(found: ExtractionAudit) -> Table:
    rows = [_row(one) for one in (found.model, found.reference) if one is not None]
    columns = ("model", "documents", "extracted", "rate", "95 % interval", "mean similarity", "largest")
    return Table(columns, rows, right=frozenset(range(1, len(columns))))


def _row(one: Extraction) -> tuple[str, ...]:
    low, high = one.interval
    return (
        one.model,
        number(len(one.similarities)),
        number(one.hits),
        f"{one.rate:.4f}",
        f"{low:.4f} to {high:.4f}",
        f"{one.mean_similarity:.3f}",
        f"{max(one.similarities):.3f}",
    )


def _notes(found: ExtractionAudit) -> list[str]:
    how = found.settings
    notes = [
        f"{how.prefix} tokens given, {how.continuation} asked for, {how.samples} samples each, top-k {how.top_k}, "
        f"top-p {how.top_p:g}, temperature {how.temperature:g}; extracted from similarity {how.threshold:g} on; "
        f"random seed {how.seed}",
        f"documents: {number(found.long_enough)} long enough, {number(found.too_short)} too short",
    ]
    if found.reference is not None:
        notes.append(
            f"extracted from {found.model.model} and not from {found.reference.model}: {found.only_model}"
        )
    return notes


command.add_command(extraction)
