"""`expertctl data`: the text of the domains, as tokens, sorted into clusters, and public text that stands in for theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import Group, cli_command
from ..output import Table, number
from ..parsing import as_dictionary, names, setting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...core.config.settings import DomainConfig
    from ...experts.text.corpora import PreparedDomain

HEADINGS = ("domain", "part", "documents", "tokens", "bytes")


@click.group("data", cls=Group)
def command() -> None:
    """Tokenise the domains' text, show what there is, sort it into clusters, or pick proxies for it."""


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


@cli_command("proxy", example="expertctl data proxy law-proxy --like law --from web --documents 500")
@click.argument("name", metavar="NAME")
@click.option("--like", required=True, metavar="DOMAIN", help="What the documents are to look like.")
@click.option("--from", "source", required=True, metavar="PUBLIC", help="Domain that they are picked from.")
@click.option(
    "--documents",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many. Default: a tenth of what PUBLIC has, at most 1,000.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="Random seed of the sample that the classifier learns from.",
)
@click.option("--force", is_flag=True, help="Replace a proxy of that name.")
@pass_session
def proxy(
    session: Session, name: str, like: str, source: str, documents: int | None, seed: int, force: bool
) -> None:
    """Pick public documents that look like a domain's.

    A router can be tuned on them where the domain's own text may not go. Nothing of that text is written.
    """
    workspace = session.open()
    with session.count("documents", "documents") as count:
        made = workspace.proxy(
            name,
            like=like,
            source=source,
            documents=documents,
            seed=seed,
            force=force,
            tell=lambda work, done: count.to(done, work),
        )
    text = made.text
    if documents is not None and text.documents < documents:
        session.note(f"--documents: '{source}' has only {number(text.documents)} documents that differ")
    session.finish(
        {"file": str(made.path), **made.statement(), "domain": made.domain()},
        f"{number(text.documents)} documents ({number(text.bytes)} bytes) of '{source}' that look like '{like}' are "
        f"in {made.path}",
        f"held-out accuracy {made.held_out_accuracy:.3f}, lowest score {made.lowest_score:.3f}",
        *([] if name in workspace.config.domains else ["", *_lines_to_add(name, made.domain())]),
    )


@cli_command("discover", example="expertctl data discover campus --clusters 8")
@click.argument("name", metavar="NAME")
@click.option(
    "--clusters", type=click.IntRange(min=1), metavar="K", help="How many; --by metadata needs no number."
)
@click.option(
    "--by",
    default="tfidf",
    show_default=True,
    metavar="DISCOVERER",
    help="What documents are told apart by; `expertctl plugins` lists the choices.",
)
@click.option(
    "--option",
    "options",
    type=setting,
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the discoverer.",
)
@click.option(
    "--domains", type=names, metavar="A,B", help="Text that is sorted. Default: all that was not discovered."
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Documents that words and centres are learnt from. Default: 50,000.",
)
@click.option(
    "--stop-words",
    metavar="WHICH",
    help="Words that say nothing of a text: english (default), none, or a file with one on each line.",
)
@click.option(
    "--analyser",
    type=click.Choice(["words", "characters"]),
    help="What texts are told apart by. Default: words, or characters where scripts have no spaces.",
)
@click.option("--unbalanced", is_flag=True, help="Let clusters be of any size when centres are learnt.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Random seed."
)
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Processes. Default: one per core.")
@click.option("--force", is_flag=True, help="Replace a set of that name.")
@pass_session
def discover(
    session: Session,
    name: str,
    clusters: int | None,
    by: str,
    options: tuple[tuple[str, Any], ...],
    domains: tuple[str, ...] | None,
    sample: int | None,
    stop_words: str | None,
    analyser: str | None,
    unbalanced: bool,
    seed: int,
    jobs: int | None,
    force: bool,
) -> None:
    """Sort unlabelled text into clusters, which become domains NAME-0, NAME-1 ..."""
    flags = [
        ("stop_words", None if stop_words == "none" else stop_words, stop_words is not None),
        ("analyser", analyser, analyser is not None),
        ("balanced", False, unbalanced),
    ]
    chosen = as_dictionary((*options, *((key, value) for key, value, given in flags if given)))
    workspace = session.open()
    with session.count("documents", "documents") as count:
        found = workspace.discover(
            name,
            clusters,
            by=by,
            domains=domains,
            sample=sample,
            seed=seed,
            jobs=jobs,
            force=force,
            say=session.note,
            tell=lambda work, done: count.to(done, work),
            **chosen,
        )
    rows = [
        (
            cluster.name,
            number(cluster.documents["train"]),
            number(cluster.documents["valid"]),
            number(cluster.bytes["train"]),
            ", ".join(cluster.top_words[:8]),
        )
        for cluster in found.clusters
    ]
    session.finish(
        {"folder": str(found.folder), **found.statement()},
        Table(("domain", "train", "valid", "bytes", "words"), rows, right=frozenset({1, 2, 3})),
        f"go on with: expertctl branch --clusters {name}",
    )


def _lines_to_add(name: str, domain: Mapping[str, str]) -> list[str]:
    """Return what the user adds to `expertctl.yaml`; JSON strings are YAML strings too."""
    import json

    settings = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in domain.items())
    return ["to use it, add to expertctl.yaml:", "domains:", f"  {json.dumps(name)}: {{{settings}}}"]


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
command.add_command(proxy)
command.add_command(discover)
