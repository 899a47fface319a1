"""Options of commands: short constructors, and groups of options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from .parsing import as_dictionary, job_count, names, setting

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]


def option(flags: str, metavar: str | None, help: str, *, name: str | None = None, **settings: Any) -> Decorator[Any]:
    """Return an option; `flags` such as `-o, --output`, `name` is that of its parameter. A default is shown in the help."""
    if settings.get("default") is not None:
        settings.setdefault("show_default", True)
    declarations = (*flags.split(", "), *([name] if name is not None else []))
    return click.option(*declarations, metavar=metavar, help=help, **settings)


def flag(flags: str, help: str, *, name: str | None = None) -> Decorator[Any]:
    """Return an option without a value."""
    return option(flags, None, help, name=name, is_flag=True)


def integer(flags: str, help: str, *, least: int = 1, metavar: str = "N", **settings: Any) -> Decorator[Any]:
    """Return an option for a whole number of at least `least`."""
    return option(flags, metavar, help, type=click.IntRange(min=least), **settings)


class Number(click.FloatRange):
    """A number within limits; not NaN, which is within all of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number) or math.isinf(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def fraction(flags: str, metavar: str, help: str, *, allow_zero: bool = False, **settings: Any) -> Decorator[Any]:
    """Return an option for a number of at most 1 that is above 0, or at least 0 with `allow_zero`."""
    return option(flags, metavar, help, type=Number(0, 1, min_open=not allow_zero), **settings)


def choice(flags: str, choices: Sequence[str], help: str, **settings: Any) -> Decorator[Any]:
    """Return an option for one of a few words."""
    return option(flags, None, help, type=click.Choice(choices), **settings)


def name_list(flags: str, help: str, **settings: Any) -> Decorator[Any]:
    """Return an option for names separated by commas."""
    return option(flags, "A,B", help, type=names, **settings)


def path(flags: str, metavar: str, help: str, *, file: bool = False, **settings: Any) -> Decorator[Any]:
    """Return an option for a path; with `file`, that of an existing file."""
    kind = click.Path(path_type=Path, exists=True, dir_okay=False) if file else click.Path(path_type=Path)
    return option(flags, metavar, help, type=kind, **settings)


def pairs(flags: str, name: str, help: str) -> Decorator[Any]:
    """Return a repeatable option KEY=VALUE, whose parameter is a dictionary."""

    def collect(ctx: click.Context, param: click.Parameter, value: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        return as_dictionary(value)

    return option(flags, "KEY=VALUE", help, name=name, type=setting, multiple=True, callback=collect)


def jobs(help: str) -> Decorator[Any]:
    """Return the option for how many runs train at the same time."""
    return option("--jobs", "N|auto", help, type=job_count)


def with_options(*options: Decorator[Any]) -> Decorator[Any]:
    """Return a decorator that adds several options, in this order."""

    def decorate(function: Function) -> Function:
        for decorator in reversed(options):
            function = decorator(function)
        return function

    return decorate


with_training = with_options(
    option("--tokens", "N", "Training budget in tokens.", type=int),
    pairs("--set", "settings", "Set another training setting; repeatable."),
    pairs("--option", "options", "Set an option of the trainer; repeatable."),
)


with_device_map = option(
    "--device-map",
    "MAP",
    "Devices of the members of an ensemble or a stitched model: code=cuda:0,law=cpu, or auto (spread over the GPUs).",
)

with_decoder = with_options(
    option("--decoder", "NAME", "Decoder, such as contrastive; `expertctl plugins` lists the choices."),
    pairs("--decoder-option", "decoder_options", "Set an option of the decoder; repeatable."),
)

with_quantise = option(
    "--quantise", "HOW", "Keep the weights of linear layers in 8 bits (int8) or 4 (nf4), by bitsandbytes."
)


def training_settings(tokens: int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training settings for the options `--tokens` and `--set`."""
    return as_dictionary((*settings.items(), *([("tokens", tokens)] if tokens is not None else [])))
