"""Review of a delivery: shown to the owner, who must consent before anything leaves."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ...core.errors import UserError
from ...core.reporting import printable
from ..context import Session
from ..output import Table, number, plain_table, short

if TYPE_CHECKING:
    from ...experts.federation.owner.owner import Review


def require_consent(session: Session, review: Review, *, full: bool, yes: bool) -> None:
    """Show a delivery and ask the owner to confirm it, unless `yes`; raises `UserError` without a confirmation.

    `full` also lists every tensor.
    """
    if yes and not full:
        return
    for line in review_lines(review, full=full):
        click.echo(printable(line), err=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(
            "nothing is sent without your consent, and there is no terminal to ask; inspect it with --review, then use --yes"
        )
    if not click.confirm("Send this delivery?", err=True):
        raise UserError("nothing is sent; the expert stays in your state folder")


def review_lines(review: Review, *, full: bool) -> list[str]:
    """Return the lines that describe a delivery; `full` also lists every tensor."""
    recipe = review.request.recipe
    content = f"{recipe.round}, weights" if recipe.round is not None else f"{recipe.trains} for seed"
    lines = [f"request {review.request.id}: {content} {short(review.request.seed)}"]
    for domain in review.data.domains.values():
        lines.append(
            f"statement about your text: about {number(domain.documents)} documents, {number(domain.tokens)} tokens, "
            f"{number(domain.bytes)} bytes; licence {domain.licence or 'not stated'}"
        )
    spent = review.privacy
    lines.append(
        f"privacy spent: epsilon {spent.epsilon:g}, delta {spent.delta:g}"
        if spent is not None and spent.epsilon is not None
        else "privacy: trained without noise; memorised text can be extracted from the weights (see `expertctl audit extraction`)"
    )
    if full:
        rows = [
            (name, info["dtype"], "x".join(map(str, info["shape"])), number(info["bytes"]), short(info["digest"]))
            for name, info in review.tensors.items()
        ]
        table = Table(("tensor", "dtype", "shape", "bytes", "digest"), rows, right=frozenset({3}))
        lines += plain_table(table).splitlines()
    lines.append(
        f"{len(review.tensors)} tensors in {number(sum(review.files.values()))} bytes: {', '.join(review.files)}"
    )
    return lines
