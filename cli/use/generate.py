"""`expertctl generate`: sample text and show which expert contributed most to each token."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, integer, name_list, option

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...core.models.generation import GeneratedToken, Generation

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red", "bright_cyan", "bright_yellow", "bright_magenta")


@cli_command("generate", example='expertctl generate forest "def main(" --max-new-tokens 40 --show-experts')
@click.argument("model", metavar="MODEL")
@click.argument("prompt", metavar="PROMPT")
@integer("--max-new-tokens", "Maximum length of the continuation, in tokens.", default=64)
@option("--temperature", "T", "Sampling temperature; 0 is greedy.", type=click.FloatRange(min=0), default=0.8)
@option(
    "--top-p",
    "P",
    "Sample only from the most probable tokens up to this cumulative probability.",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
)
@integer("--seed", "Random seed.", least=0, default=0)
@name_list("--without", "Disable these experts of an ensemble or a mixture for this call.", multiple=True)
@flag("--show-experts", "Mark each token with the expert of the highest weight (ensembles).")
@pass_session
def command(
    session: Session,
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    without: tuple[tuple[str, ...], ...],
    show_experts: bool,
) -> None:
    """Sample a continuation of a prompt.

    MODEL is a name in this workspace or a folder. PROMPT is the text, or - to read it from standard input.
    """
    folder = session.artefact(model)
    text = sys.stdin.read() if prompt == "-" else prompt
    from ...core.models.generation import Sampling, generate

    with session.progress() as progress, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: progress.say(str(message))
        generation = generate(
            folder,
            text,
            Sampling(max_new_tokens, temperature, top_p, seed),
            without=[name for several in without for name in several],
            shares=show_experts,
            reporter=progress,
        )
    content = {
        "model": model,
        "prompt": text,
        "text": generation.text,
        "experts": list(generation.experts),
        "prompt_tokens": _content(generation.prompt),
        "tokens": _content(generation.continuation),
    }
    session.finish(content, *(_by_expert(generation) if show_experts else (text + generation.text,)))


def _content(tokens: Sequence[GeneratedToken]) -> list[dict[str, Any]]:
    return [
        {"id": token.id, "text": token.text, "experts": None if token.shares is None else dict(token.shares)}
        for token in tokens
    ]


def _by_expert(generation: Generation) -> tuple[str, ...]:
    """Return the text with each token's expert marked, and a legend."""
    tokens = (*generation.prompt, *generation.continuation)
    counts = dict.fromkeys(generation.experts, 0)
    for token in tokens:
        if token.shares:
            counts[max(token.shares, key=token.shares.__getitem__)] += 1
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    numbers = {name: number for number, name in enumerate(generation.experts, start=1)}
    text = "".join(_mark(piece, numbers[name], in_colour) if name else piece for name, piece in _runs_of_tokens(tokens))
    legend = (
        f"{_mark(name, number, in_colour) if in_colour else f'[{number}] {name}'}: {counts[name]} tokens"
        for name, number in numbers.items()
    )
    return (text, "", *legend)


def _runs_of_tokens(tokens: Sequence[GeneratedToken]) -> Iterator[tuple[str | None, str]]:
    """Yield (expert, text) for each run of consecutive tokens with the same leading expert."""
    expert: str | None = None
    text = ""
    for token in tokens:
        name = max(token.shares, key=token.shares.__getitem__) if token.shares else None
        if name != expert and text:
            yield expert, text
            text = ""
        expert = name
        text += token.text
    yield expert, text


def _mark(text: str, number: int, in_colour: bool) -> str:
    return click.style(text, fg=COLOURS[(number - 1) % len(COLOURS)]) if in_colour else f"[{number}]{text}"
