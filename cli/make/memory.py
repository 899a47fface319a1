"""`expertctl memory`: datastores of text for the decoder `knn`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import Group
from ..options import choice, flag, integer, name_list, option
from ..output import Table, short
from ..summaries import fit_line, memory_content, memory_origin

if TYPE_CHECKING:
    from ...core.models.decoding.memories.manifest import MemoryManifest

DEFAULT_K = 64
FIT_TOKENS = 20_000


@click.group("memory", cls=Group)
def command() -> None:
    """Build memories of text, which the decoder `knn` looks up.

    A memory works without training. It contains the tokens of its text, which can be read from its files.
    """


@command.command("build", example="expertctl memory build statutes --domains law --model seed")
@click.argument("name", metavar="NAME")
@name_list("--domains", "Domains whose training text is remembered.", required=True)
@option("--model", "MODEL", "Model that reads the text: seed, an expert, or an average.", default="seed")
@integer("--context", "Least number of tokens before a key. Default: half of a window.", least=0)
@choice(
    "--index",
    ["exact", "ivf"],
    "Search among all keys, or among those of the nearest lists (needs faiss). Default: by their number.",
)
@choice("--codes", ["float16", "int8", "pq"], "How the index holds keys. Default: float16 for exact, int8 for ivf.")
@flag("--no-fit", "Do not fit lambda and temperature on validation text.")
@integer("--k", "Number of neighbours for the fit, and default of the decoder.", default=DEFAULT_K)
@integer("--fit-tokens", "Number of validation tokens for the fit.", default=FIT_TOKENS)
@flag("--force", "Replace an existing memory.")
@pass_session
def build(
    session: Session,
    name: str,
    domains: tuple[str, ...],
    model: str,
    context: int | None,
    index: Any,
    codes: Any,
    no_fit: bool,
    k: int,
    fit_tokens: int,
    force: bool,
) -> None:
    """Build a memory of the training text of domains."""
    workspace = session.open()
    from ...experts.memories.settings import BuildSettings

    settings = BuildSettings(context, index, codes, fit=not no_fit, k=k, fit_tokens=fit_tokens)
    with session.progress() as progress:
        memory = workspace.memories.build(name, domains, model, settings, force=force, reporter=progress)
    _finish(
        session,
        memory,
        f"memory '{name}' {short(memory.digest)} is in {workspace.memories / name}: {memory_origin(memory)}",
    )


@command.command("fit", example="expertctl memory fit statutes --domains law")
@click.argument("name", metavar="NAME")
@name_list("--domains", "Domains whose validation text is read. Default: those of the memory.")
@integer("--k", "Number of neighbours, which becomes the default of the decoder.", default=DEFAULT_K)
@integer("--tokens", "Number of validation tokens.", default=FIT_TOKENS)
@pass_session
def fit(session: Session, name: str, domains: tuple[str, ...] | None, k: int, tokens: int) -> None:
    """Fit lambda and temperature of a memory on validation text.

    They become the defaults of the decoder.
    """
    with session.progress() as progress:
        memory = session.open().memories.fit(name, domains, k=k, tokens=tokens, reporter=progress)
    _finish(session, memory, f"memory '{memory.name}' was fitted")


@command.command("list", example="expertctl memory list")
@pass_session
def list_memories(session: Session) -> None:
    """List the memories of the workspace."""
    memories = session.open().memories.list()
    rows = [(memory.name, short(memory.digest), memory_origin(memory), memory.index.kind) for memory in memories]
    session.finish(
        {"memories": [memory_content(memory) for memory in memories]},
        Table(("name", "digest", "made", "index"), rows)
        if rows
        else "no memories; build one with `expertctl memory build`",
    )


def _finish(session: Session, memory: MemoryManifest, line: str) -> None:
    fitted = [fit_line(memory)] if memory.fit is not None else []
    if memory.fit is not None and memory.fit.lambda_ == 0:
        session.note(
            "the memory does not help on this validation text, so the decoder ignores it unless lambda is given"
        )
    session.finish(memory_content(memory), line, *fitted)
