"""`expertctl audit`: measure what a model reveals of its training text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..context import GATE_FAILED, Session, pass_session
from ..group import Group
from ..options import Number, fraction, integer, option
from ..output import Table, number

if TYPE_CHECKING:
    from ...experts.measures.extraction_audit import Extraction, ExtractionAudit


@click.group("audit", cls=Group)
def command() -> None:
    """Measure what a model reveals of its training text.

    Run it where the text is. The output contains only counts and similarities, no text.
    """


@command.command("extraction", example="expertctl audit extraction clinic --data clinic --against seed --documents 500")
@click.argument("model", metavar="EXPERT")
@option(
    "--data",
    "DOMAIN|PATH",
    "Training text of the model: a domain (its training split), a file or a folder.",
    required=True,
)
@option("--text-field", "NAME", "Field with the text in the files at PATH.", default="text")
@option("--against", "MODEL", "Also attack this model, which was not trained on the text, such as the seed.")
@integer("--documents", "Maximum number of documents to try.", default=1000)
@integer("--prefix", "Number of tokens in the prompt.", default=32)
@integer("--continuation", "Number of tokens to extract.", default=256)
@integer("--samples", "Number of samples per document.", default=10)
@integer("--top-k", "Top-k of the sampling.", metavar="K", default=50)
@fraction("--top-p", "P", "Top-p of the sampling.", default=0.95)
@option("--temperature", "T", "Temperature of the sampling.", type=Number(min=0, min_open=True), default=1.0)
@fraction("--threshold", "S", "Minimum similarity for a document to count as extracted.", allow_zero=True, default=0.9)
@integer(
    "--batch-size",
    "Number of continuations to sample at the same time. Affects memory, speed and the random samples.",
    default=40,
)
@integer("--seed", "Random seed.", least=0, default=0)
@fraction(
    "--at-most",
    "RATE",
    "Exit with status 3 if the upper end of the confidence interval exceeds this rate.",
    allow_zero=True,
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
    """Try to extract training documents from a model.

    The model is prompted with the first tokens of a document and samples a continuation. A document counts as extracted
    if the normalised Levenshtein similarity, over tokens, to the true continuation reaches the threshold.
    """
    folder = session.artefact(model)
    reference = session.artefact(against) if against is not None else None
    documents = _documents(session, data, text_field)
    from ...experts.measures.extraction_audit import AttackSettings, audit_extraction

    with session.progress() as progress:
        audit = audit_extraction(folder, documents, AttackSettings(**settings), reference=reference, reporter=progress)
    session.finish(audit.as_json(), _table(audit), "", *_notes(audit))
    low, high = audit.model.interval
    if at_most is not None and high > at_most:
        click.echo(
            f"Error: the extraction rate is {audit.model.rate:.4f} (95 % interval {low:.4f} to {high:.4f}) and may exceed "
            f"{at_most:g}",
            err=True,
        )
        return GATE_FAILED
    return 0


def _documents(session: Session, data: str, text_field: str) -> Iterable[str]:
    """Return the documents of a domain's training split, or of a file or folder."""
    from ...core.errors import unknown_name
    from ...experts.text.corpora import domain_documents, read_documents, require_text

    layout = session.layout()
    domains = session.open().config.domains if layout is not None else {}
    if layout is not None and data in domains:
        require_text(data, domains[data], "the audit")
        return domain_documents(domains[data], layout.root, "train")
    path = Path(data).expanduser()
    if not path.exists():
        raise unknown_name("domain or path", data, domains, listed_as="expertctl.yaml has")
    return read_documents(path, text_field)


def _table(audit: ExtractionAudit) -> Table:
    rows = [_row(extraction) for extraction in (audit.model, audit.reference) if extraction is not None]
    columns = ("model", "documents", "extracted", "rate", "95 % interval", "mean similarity", "largest")
    return Table(columns, rows, right=frozenset(range(1, len(columns))))


def _row(extraction: Extraction) -> tuple[str, ...]:
    low, high = extraction.interval
    return (
        extraction.model,
        number(len(extraction.similarities)),
        number(extraction.hits),
        f"{extraction.rate:.4f}",
        f"{low:.4f} to {high:.4f}",
        f"{extraction.mean_similarity:.3f}",
        f"{max(extraction.similarities):.3f}",
    )


def _notes(audit: ExtractionAudit) -> list[str]:
    settings = audit.settings
    notes = [
        f"{settings.prefix} prompt tokens, {settings.continuation} continuation tokens, {settings.samples} samples per document, "
        f"top-k {settings.top_k}, top-p {settings.top_p:g}, temperature {settings.temperature:g}; similarity threshold {settings.threshold:g}; "
        f"random seed {settings.seed}",
        f"documents: {number(audit.long_enough)} long enough, {number(audit.too_short)} too short",
    ]
    if audit.reference is not None:
        notes.append(f"extracted from {audit.model.model}, but not from {audit.reference.model}: {audit.only_model}")
    return notes
