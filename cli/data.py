"""`expertctl data`: the text of the domains, as tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .context import Session, pass_session
from .group import Group, cli_command
from .output import Table, number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..core.config import DomainConfig
    from ..experts.corpora import PreparedDomain

HEADINGS = ("domain", "part", "documents", "tokens", "bytes")


@click.group("data", cls=Group)
def command() -> None:
    """Tokenise the domains' text, or show what there is."""


@cli_command("prepare", example="expertctl data prepare law code")
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@click.option("--force", is_flag=True, help="Read the text again even if it has not changed.")
@pass_session
def prepare(session: Session, domains: tuple[str, ...], force: bool) -> None:
    """Tokenise domains (default: all) with the seed's tokenizer.

    Training and evaluation do this by themselves when it is needed. What is prepared already costs nothing.
    """
    workspace = session.open()
    with session.count("documents", "documents") as count:
        prepared = workspace.prepare(
            domains or None, force=force, tell=lambda domain, documents: count.to(documents, domain)
        )
    found = {domain.name: domain for domain in prepared}
    session.finish({"domains": {name: _content(domain) for name, domain in found.items()}}, _table(found))


@cli_command("list", example="expertctl data list")
@pass_session
def list_(session: Session) -> None:
    """Show the domains: where their text is, how much there is."""
    workspace = session.open()
    domains = workspace.config.domains
    prepared = workspace.prepared()
    content = {
        name: {"source": _source(domain), "prepared": _content(prepared[name])}
        for name, domain in domains.items()
    }
    if not domains:
        session.finish({"domains": {}}, f"there is no domain yet; add one to {workspace.layout.config_file}")
        return
    sources = Table(
        ("domain", "source", "prepared"),
        [(name, _source(domain), "yes" if prepared[name] else "no") for name, domain in domains.items()],
    )
    ready = {name: domain for name, domain in prepared.items() if domain is not None}
    parts: list[str | Table] = [sources]
    if ready:
        parts += ["", _table(ready)]
    session.finish({"domains": content}, *parts)


def _content(domain: PreparedDomain | None) -> dict[str, Any] | None:
    if domain is None:
        return None
    counts = {
        part: {"documents": one.documents, "tokens": one.tokens, "bytes": one.bytes, "digest": one.digest}
        for part, one in (("train", domain.train), ("valid", domain.valid))
    }
    return {**counts, "licence": domain.licence}


def _table(domains: Mapping[str, PreparedDomain]) -> Table:
    rows = []
    for name, domain in domains.items():
        for part, counts in (("train", domain.train), ("valid", domain.valid)):
            rows.append((name, part, number(counts.documents), number(counts.tokens), number(counts.bytes)))
    return Table(HEADINGS, rows, right=frozenset({2, 3, 4}))


def _source(domain: DomainConfig) -> str:
    if domain.bundled is not None:
        return f"bundled {domain.bundled}"
    return domain.path or f"{domain.train} and {domain.valid}"


command.add_command(prepare)
command.add_command(list_)
