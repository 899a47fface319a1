"""`expertctl generate`: sample text and show which expert contributed most to each token."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import Number, flag, fraction, integer, name_list, option, with_decoder, with_device_map, with_quantise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...core.models.generation import GeneratedToken, Generation

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red", "bright_cyan", "bright_yellow", "bright_magenta")


@cli_command("generate", example='expertctl generate forest "def main(" --max-new-tokens 40 --show-experts')
@click.argument("model", metavar="MODEL")
@click.argument("prompt", metavar="PROMPT")
@integer("--max-new-tokens", "Maximum length of the continuation, in tokens.", default=64)
@option("--temperature", "T", "Sampling temperature; 0 is greedy.", type=Number(min=0), default=0.8)
@fraction("--top-p", "P", "Sample only from the most probable tokens up to this cumulative probability.", default=1.0)
@integer("--top-k", "Sample only from so many of the most probable tokens; 0: from all.", least=0, default=0)
@option(
    "--min-p", "P", "Sample only from tokens with this share of the largest probability.", type=Number(0, 1), default=0
)
@option(
    "--repetition-penalty",
    "R",
    "Above 1, tokens that occurred before are less probable.",
    type=Number(0, min_open=True),
    default=1.0,
)
@integer("--beams", "Number of beams of a beam search; it samples unless --temperature is 0.", default=1)
@option("--stop", "TEXT", "End the continuation at this text; repeatable.", multiple=True)
@integer("--seed", "Random seed.", least=0, default=0)
@name_list("--without", "Disable these experts of an ensemble or a mixture for this call.", multiple=True)
@option("--domain", "NAME", "Domain of the text, for which an ensemble may have a prior of its own.")
@with_device_map
@with_quantise
@with_decoder
@flag("--show-experts", "Mark each token with the expert of the highest weight (ensembles).")
@pass_session
def command(
    session: Session,
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    beams: int,
    stop: tuple[str, ...],
    seed: int,
    without: tuple[tuple[str, ...], ...],
    domain: str | None,
    device_map: str | None,
    quantise: str | None,
    decoder: str | None,
    decoder_options: dict[str, Any],
    show_experts: bool,
) -> None:
    """Sample a continuation of a prompt.

    MODEL is a name in this workspace or a folder. PROMPT is the text, or - to read it from standard input.
    """
    folder = session.artefact(model)
    if decoder_options and decoder is None:
        raise click.UsageError("--decoder-option needs --decoder")
    text = sys.stdin.read() if prompt == "-" else prompt
    from ...core.models.decoding.opening import DecoderChoice
    from ...core.models.generation import Sampling, generate

    with session.progress() as progress, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: progress.say(str(message))
        generation = generate(
            folder,
            text,
            Sampling(max_new_tokens, temperature, top_p, seed, top_k, min_p, repetition_penalty, beams, stop),
            without=[name for several in without for name in several],
            domain=domain,
            shares=show_experts,
            device_map=device_map,
            quantise=quantise,
            decoder=None
            if decoder is None
            else DecoderChoice(decoder, decoder_options, session.artefact, session.memory, session.index),
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
    counts = Counter(map(_leading_expert, tokens))
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    numbers = {name: number for number, name in enumerate(generation.experts, start=1)}
    runs = ((name, "".join(token.text for token in run)) for name, run in groupby(tokens, key=_leading_expert))
    text = "".join(_mark(piece, numbers[name], in_colour) if name and piece else piece for name, piece in runs)
    legend = (
        f"{_mark(name, number, in_colour) if in_colour else f'[{number}] {name}'}: {counts[name]} tokens"
        for name, number in numbers.items()
    )
    return (text, "", *legend)


def _leading_expert(token: GeneratedToken) -> str | None:
    """Return the expert with the highest weight for a token; None without weights."""
    return max(token.shares, key=token.shares.__getitem__) if token.shares else None


def _mark(text: str, number: int, in_colour: bool) -> str:
    return click.style(text, fg=COLOURS[(number - 1) % len(COLOURS)]) if in_colour else f"[{number}]{text}"
