"""`expertctl index`: build indexes of domains, and search them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..context import Session, pass_session
from ..group import Group
from ..options import flag, integer, name_list, option, path
from ..output import Table, number

if TYPE_CHECKING:
    from ...experts.retrieval.index import IndexManifest


@click.group("index", cls=Group)
def command() -> None:
    """Make the text of domains searchable, for `--decoder replug`."""


@command.command("build", example="expertctl index build library --domains law,news")
@click.argument("name", metavar="NAME")
@name_list("--domains", "Domains whose training text is indexed. Default: all.")
@path("--embedder", "DIR", "Sentence-embedding model to search by. Default: by words (BM25).")
@option("--tune-for", "MODEL", "Tune the embedder for this model: passages count as near that help it to predict.")
@integer("--tuning-steps", "Steps of the tuning.", default=200)
@integer("--characters", "Length of the longest passage.", default=500)
@flag("--force", "Replace an existing index of that name.")
@pass_session
def build(
    session: Session,
    name: str,
    domains: tuple[str, ...] | None,
    embedder: Path | None,
    tune_for: str | None,
    tuning_steps: int,
    characters: int,
    force: bool,
) -> None:
    """Write an index to indexes/NAME.

    It holds the text of the domains: keep it where the text may be. Without the training text of a domain, build it again.
    """
    from ...experts.retrieval.tuning import RetrieverTuning

    workspace = session.open()
    with session.progress() as progress:
        manifest = workspace.data.index(
            name,
            domains,
            embedder=embedder,
            tune_for=tune_for,
            tuning=RetrieverTuning(tuning_steps),
            characters=characters,
            force=force,
            reporter=progress,
        )
    folder = workspace.layout.indexes / name
    session.finish(
        {"index": name, "folder": str(folder), "search": manifest.search, "domains": _counts(manifest)},
        f"{number(sum(count.passages for count in manifest.domains.values()))} passages of {', '.join(manifest.domains)}, "
        f"searched by {manifest.search}: {folder}",
    )


@command.command("list", example="expertctl index list")
@pass_session
def list_(session: Session) -> None:
    """List the indexes of the workspace."""
    indexes = session.open().data.indexes()
    content = {index.name: {"search": index.search, "domains": _counts(index)} for index in indexes}
    rows = [
        (
            index.name,
            index.search,
            number(sum(count.passages for count in index.domains.values())),
            ", ".join(index.domains),
        )
        for index in indexes
    ]
    table = Table(("index", "searched by", "passages", "domains"), rows)
    session.finish({"indexes": content}, table if rows else "no indexes yet; `expertctl index build NAME` makes one")


@command.command("search", example='expertctl index search library "who signs the contract"')
@click.argument("name", metavar="NAME")
@click.argument("query")
@integer("--count", "Number of passages.", default=5)
@pass_session
def search(session: Session, name: str, query: str, count: int) -> None:
    """Print the passages of an index that fit a query best."""
    found = session.open().data.search(name, query, count)
    content = [{"domain": one.passage.domain, "score": one.score, "text": one.passage.text} for one in found]
    lines = [f"{one.score:.3f}  {one.passage.domain}\n{one.passage.text}\n" for one in found]
    session.finish(
        {"index": name, "query": query, "passages": content}, *(lines or ["no passage has a word of the query"])
    )


def _counts(manifest: IndexManifest) -> dict[str, dict[str, int]]:
    return {
        domain: {"documents": count.documents, "passages": count.passages} for domain, count in manifest.domains.items()
    }
