"""What an owner is shown before an expert leaves, and asked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ..context import Session
from ..output import Table, number, short

if TYPE_CHECKING:
    from ...experts.federation.owner.owner import Review


def agree(session: Session, review: Review, *, whole: bool, yes: bool) -> None:
    """Show an owner what would leave and wait for a yes; raises `UserError` for anything else."""
    if yes and not whole:
        return
    for line in review_lines(review, whole=whole):
        click.echo(line, err=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(
            "nothing leaves without your yes, and there is nobody to ask; look at --review, then use --yes"
        )
    if not click.confirm("Let this leave?", err=True):
        raise UserError("nothing has left; the expert stays in your state folder")


def review_lines(review: Review, *, whole: bool) -> list[str]:
    """Return what an owner is shown before anything leaves."""
    from ..output import plain_table

    domains = review.data.get("domains", {})
    recipe = review.request.recipe
    what = f"{recipe.round}, weights" if recipe.round is not None else f"{recipe.trains} for seed"
    lines = [f"request {review.request.id}: {what} {short(review.request.seed)}"]
    for about in domains.values():
        lines.append(
            f"told of your text: about {number(about['documents'])} documents, {number(about['tokens'])} tokens, "
            f"{number(about['bytes'])} bytes; licence {about.get('licence') or 'not said'}"
        )
    spent = review.privacy
    lines.append(
        f"privacy spent: epsilon {spent['epsilon']:g}, delta {spent['delta']:g}"
        if spent is not None
        else "privacy: trained without noise; what the weights remember can be drawn out (see `expertctl audit extraction`)"
    )
    if whole:
        rows = [
            (name, dtype, "x".join(map(str, shape)), number(size), short(digest))
            for name, dtype, shape, size, digest in review.tensors
        ]
        lines += plain_table(
            Table(("tensor", "dtype", "shape", "bytes", "digest"), rows, right=frozenset({3}))
        ).splitlines()
    lines.append(
        f"{len(review.tensors)} tensors in {number(sum(review.files.values()))} bytes: {', '.join(review.files)}"
    )
    return lines


def review_content(review: Review) -> dict[str, Any]:
    """Return what `--json` says of a delivery."""
    return {
        "files": dict(review.files),
        "tensors": {
            name: {"dtype": dtype, "shape": list(shape), "bytes": size, "digest": digest}
            for name, dtype, shape, size, digest in review.tensors
        },
        "data": dict(review.data),
        "privacy": dict(review.privacy) if review.privacy is not None else None,
    }
