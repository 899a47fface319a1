"""The hooks a plugin may implement.

Collecting hooks offer things and must be cheap (no torch, no reading of files); what they offer does the
work. Each returns a list of the dataclass named in its annotation. Notifying hooks return nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from .ensembles import Mixer
    from .evaluation import Evaluator
    from .events import ExpertFinished, MergeFinished, TrainingStep
    from .merging import MergeMethod
    from .mixtures import Architecture, RouterStart
    from .text import CorpusFormat, DocumentOrder, DomainDiscoverer
    from .training import Launcher, Trainer

PROJECT = "expertctl"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def merge_methods() -> list[MergeMethod]:  # type: ignore[empty-body]  # pluggy reads the signature only
    """Ways from seed and experts to a generalist."""


@hookspec
def mixers() -> list[Mixer]:  # type: ignore[empty-body]  # as above
    """Ways to weight the members of an ensemble from text to text."""


@hookspec
def router_starts() -> list[RouterStart]:  # type: ignore[empty-body]  # as above
    """How the router rows of a mixture of experts begin."""


@hookspec
def trainers() -> list[Trainer]:  # type: ignore[empty-body]  # as above
    """Which part of a model trains, and how."""


@hookspec
def launchers() -> list[Launcher]:  # type: ignore[empty-body]  # as above
    """Where training runs."""


@hookspec
def corpus_formats() -> list[CorpusFormat]:  # type: ignore[empty-body]  # as above
    """Kinds of text files that can be read into documents."""


@hookspec
def domain_discoverers() -> list[DomainDiscoverer]:  # type: ignore[empty-body]  # as above
    """Ways to sort unlabelled text into domains."""


@hookspec
def document_orders() -> list[DocumentOrder]:  # type: ignore[empty-body]  # as above
    """Orders in which documents are packed for training."""


@hookspec
def evaluators() -> list[Evaluator]:  # type: ignore[empty-body]  # as above
    """Ways to score a model on a domain."""


@hookspec
def architectures() -> list[Architecture]:  # type: ignore[empty-body]  # as above
    """Where a model family keeps its feed-forward, attention, norm and embedding tensors."""


@hookspec
def training_step(event: TrainingStep) -> None:
    """Called in the training process after every logged optimiser step."""


@hookspec
def expert_finished(event: ExpertFinished) -> None:
    """Called in the training process once an expert's folder is complete."""


@hookspec
def merge_finished(event: MergeFinished) -> None:
    """Called once a generalist's folder is complete."""


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add commands to the `expertctl` command line: `cli.add_command(...)`."""
