"""`expertctl data`: tokenise domains, discover clusters, and build proxy corpora from public text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import Group
from ..options import choice, flag, integer, name_list, option, pairs
from ..output import Table, number
from ..parsing import as_dictionary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...core.config.settings import DomainConfig
    from ...experts.text.corpora import PreparedDomain


@click.group("data", cls=Group)
def command() -> None:
    """Tokenise, list and cluster the text of domains."""


@command.command("prepare", example="expertctl data prepare law code")
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@flag("--force", "Tokenise the text again even if it has not changed.")
@pass_session
def prepare(session: Session, domains: tuple[str, ...], force: bool) -> None:
    """Tokenise domains (default: all) with the seed's tokenizer.

    Training and evaluation do this automatically when needed. Domains that are already prepared are skipped.
    """
    workspace = session.open()
    with session.progress() as progress:
        prepared = workspace.prepare(domains or None, force=force, reporter=progress)
    by_name = {domain.name: domain for domain in prepared}
    session.finish({"domains": {name: _content(domain) for name, domain in by_name.items()}}, _table(by_name))


@command.command("list", example="expertctl data list")
@pass_session
def list_(session: Session) -> None:
    """List the domains with the source and size of their text.

    Of conversations, one is shown as the model reads it, with the text that counts towards the loss in ⟦ ⟧.
    """
    workspace = session.open()
    domains = workspace.config.domains
    prepared = workspace.data.prepared()
    ready = {name: domain for name, domain in prepared.items() if domain is not None}
    examples = {name: example for name, domain in ready.items() if (example := workspace.data.example(domain))}
    content = {
        name: {
            "source": _source(domain),
            "prepared": _content(prepared[name]),
            **(
                {"example": [{"text": text, "counts": counts} for text, counts in examples[name]]}
                if name in examples
                else {}
            ),
        }
        for name, domain in domains.items()
    }
    if not domains:
        session.finish({"domains": {}}, f"no domains yet; add one to {workspace.layout.config_file}")
        return
    sources = Table(
        ("domain", "source", "prepared"),
        [(name, _source(domain), "yes" if prepared[name] else "no") for name, domain in domains.items()],
    )
    sizes: list[str | Table] = ["", _table(ready)] if ready else []
    shown = [part for name, example in examples.items() for part in ("", _marked(name, example))]
    session.finish({"domains": content}, sources, *sizes, *shown)


@command.command("proxy", example="expertctl data proxy law-proxy --like law --from web --documents 500")
@click.argument("name", metavar="NAME")
@option("--like", "DOMAIN", "Domain that the documents should resemble.", required=True)
@option("--from", "PUBLIC", "Public domain to select documents from.", name="source", required=True)
@integer("--documents", "Number of documents. Default: a tenth of PUBLIC, at most 1,000.")
@option(
    "--seed",
    "N",
    "Random seed of the classifier's training sample.",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
)
@flag("--force", "Replace an existing proxy corpus of that name.")
@pass_session
def proxy(session: Session, name: str, like: str, source: str, documents: int | None, seed: int, force: bool) -> None:
    """Build a proxy corpus: public documents that resemble a domain.

    A router can be tuned on a proxy corpus where the domain's own text is not available. None of the domain's text is
    written.
    """
    workspace = session.open()
    with session.progress() as progress:
        corpus = workspace.data.proxy(
            name, like=like, source=source, documents=documents, seed=seed, force=force, reporter=progress
        )
    text = corpus.text
    if documents is not None and text.documents < documents:
        session.note(f"--documents: '{source}' has only {number(text.documents)} distinct documents")
    session.finish(
        {"file": str(corpus.path), **corpus.statement(), "domain": corpus.domain()},
        f"{number(text.documents)} documents ({number(text.bytes)} bytes) of '{source}' that resemble '{like}' are "
        f"in {corpus.path}",
        f"held-out accuracy {corpus.held_out_accuracy:.3f}, lowest score {corpus.lowest_score:.3f}",
        *([] if name in workspace.config.domains else ["", *_lines_to_add(name, corpus.domain())]),
    )


@command.command("discover", example="expertctl data discover campus --clusters 8")
@click.argument("name", metavar="NAME")
@integer("--clusters", "Number of clusters; not needed for --by metadata.", metavar="K")
@option("--by", "DISCOVERER", "Clustering method; `expertctl plugins` lists the discoverers.", default="tfidf")
@pairs("--option", "options", "Set an option of the discoverer; repeatable.")
@name_list("--domains", "Domains to cluster. Default: all that were not discovered.")
@integer("--sample", "Number of documents to fit vocabulary and centroids on. Default: 50,000.")
@option("--stop-words", "WHICH", "Stop words: english (default), none, or a file with one word per line.")
@choice(
    "--analyser", ["words", "characters"], "Text features. Default: words, or characters for scripts without spaces."
)
@flag("--unbalanced", "Do not balance cluster sizes when fitting centroids.")
@integer("--seed", "Random seed.", least=0, default=0)
@integer("--jobs", "Number of processes. Default: one per core.")
@flag("--force", "Replace an existing set of that name.")
@pass_session
def discover(
    session: Session,
    name: str,
    clusters: int | None,
    by: str,
    options: dict[str, Any],
    domains: tuple[str, ...] | None,
    sample: int | None,
    stop_words: str | None,
    analyser: str | None,
    unbalanced: bool,
    seed: int,
    jobs: int | None,
    force: bool,
) -> None:
    """Cluster unlabelled text into domains NAME-0, NAME-1 ..."""
    flags = [
        ("stop_words", None if stop_words == "none" else stop_words, stop_words is not None),
        ("analyser", analyser, analyser is not None),
        ("balanced", False, unbalanced),
    ]
    chosen = as_dictionary((*options.items(), *((key, value) for key, value, is_given in flags if is_given)))
    from ...experts.text.discovery import SAMPLE, DiscoverySettings

    workspace = session.open()
    settings = DiscoverySettings(by, domains, sample or SAMPLE, seed, jobs)
    with session.progress() as progress:
        discovery = workspace.discover(name, clusters, settings, force=force, reporter=progress, **chosen)
    rows = [
        (
            cluster.name,
            number(cluster.documents["train"]),
            number(cluster.documents["valid"]),
            number(cluster.documents["test"]),
            number(cluster.bytes["train"]),
            ", ".join(cluster.top_words[:8]),
        )
        for cluster in discovery.clusters
    ]
    session.finish(
        {"folder": str(discovery.folder), **discovery.statement()},
        Table(("domain", "train", "valid", "test", "bytes", "words"), rows, right=frozenset({1, 2, 3, 4})),
        f"next: expertctl branch --clusters {name}",
    )


@command.command("remove", example="expertctl data remove campus")
@click.argument("name", metavar="NAME")
@flag("--force", "Remove a set of clusters even if models were trained on it.")
@pass_session
def remove(session: Session, name: str, force: bool) -> None:
    """Remove the prepared text of a domain, or a set of discovered clusters.

    Files that the text was read from, expertctl.yaml and models stay as they are.
    """
    from dataclasses import asdict

    removed = session.open().data.remove(name, force=force)
    if removed.declared:
        session.note(f"expertctl.yaml still declares '{name}'; its text is prepared again when it is needed")
    trained = f"; trained on it: {', '.join(removed.trained)}" if removed.trained else ""
    session.finish({"removed": name, **asdict(removed)}, f"removed the prepared text of '{name}'{trained}")


def _lines_to_add(name: str, domain: Mapping[str, str]) -> list[str]:
    """Return the lines to add to `expertctl.yaml`; JSON strings are valid YAML."""
    import json

    settings = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in domain.items())
    return ["to use it, add these lines to expertctl.yaml:", "domains:", f"  {json.dumps(name)}: {{{settings}}}"]


def _content(domain: PreparedDomain | None) -> dict[str, Any] | None:
    if domain is None:
        return None
    counts = {
        part: {
            "documents": store.documents,
            "tokens": store.tokens,
            "bytes": store.bytes,
            "lost_bytes": store.lost_bytes,
            "digest": store.digest,
            **({} if store.counted_tokens is None else {"counted_tokens": store.counted_tokens}),
        }
        for part, store in domain.parts.items()
    }
    return {**counts, "licence": domain.licence}


def _table(domains: Mapping[str, PreparedDomain]) -> Table:
    rows = []
    for name, domain in domains.items():
        for part, counts in domain.parts.items():
            rows.append((name, part, number(counts.documents), number(counts.tokens), number(counts.bytes)))
    return Table(("domain", "part", "documents", "tokens", "bytes"), rows, right=frozenset({2, 3, 4}))


def _marked(name: str, example: Sequence[tuple[str, bool]]) -> str:
    """Return a conversation with its counted text in brackets."""
    from ..output import listing

    text = "".join(f"⟦{piece}⟧" if counts else piece for piece, counts in example)
    return listing(f"a conversation of {name}; the text in ⟦ ⟧ counts:", text.splitlines())


def _source(domain: DomainConfig) -> str:
    from ...core.remote.urls import without_secrets

    if domain.bundled is not None:
        return f"bundled {domain.bundled}"
    sources = (domain.path, domain.train, domain.valid, domain.test)
    return ", ".join(without_secrets(source) for source in sources if source)
