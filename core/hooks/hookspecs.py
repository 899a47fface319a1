"""The hooks that a plugin can implement.

Collecting hooks return a list of the dataclass in their annotation; they must be cheap (no torch, no reading of files).
Notifying hooks return nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from .ensembles import Mixer
    from .evaluation import Decoder, Evaluator, Exporter
    from .events import ExpertFinished, MergeFinished, Tracker, TrainingStep
    from .merging import MergeMethod
    from .mixtures import Architecture, RouterStart
    from .steps import Objective, Optimiser
    from .text import CorpusFormat, DocumentOrder, DomainDiscoverer
    from .training import Launcher, Trainer

PROJECT = "expertctl"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def merge_methods() -> list[MergeMethod]:  # type: ignore[empty-body]  # pluggy reads the signature only
    """Merge methods, which make a generalist from a seed and experts."""


@hookspec
def mixers() -> list[Mixer]:  # type: ignore[empty-body]  # as above
    """Mixers, which weight the members of an ensemble for each text."""


@hookspec
def router_starts() -> list[RouterStart]:  # type: ignore[empty-body]  # as above
    """Initialisations of the router of a mixture of experts."""


@hookspec
def trainers() -> list[Trainer]:  # type: ignore[empty-body]  # as above
    """Trainers, which choose and prepare the trainable parameters of a model."""


@hookspec
def objectives() -> list[Objective]:  # type: ignore[empty-body]  # as above
    """Objectives, which say what the loss of a batch is."""


@hookspec
def optimisers() -> list[Optimiser]:  # type: ignore[empty-body]  # as above
    """Optimisers of training runs."""


@hookspec
def launchers() -> list[Launcher]:  # type: ignore[empty-body]  # as above
    """Launchers, which start the processes of training runs."""


@hookspec
def trackers() -> list[Tracker]:  # type: ignore[empty-body]  # as above
    """Experiment trackers, which record training runs and merges."""


@hookspec
def corpus_formats() -> list[CorpusFormat]:  # type: ignore[empty-body]  # as above
    """Formats of text files that documents are read from."""


@hookspec
def domain_discoverers() -> list[DomainDiscoverer]:  # type: ignore[empty-body]  # as above
    """Methods that find domains in unlabelled text."""


@hookspec
def document_orders() -> list[DocumentOrder]:  # type: ignore[empty-body]  # as above
    """Orders in which documents are packed into training blocks."""


@hookspec
def evaluators() -> list[Evaluator]:  # type: ignore[empty-body]  # as above
    """Evaluators, which score a model on a domain."""


@hookspec
def decoders() -> list[Decoder]:  # type: ignore[empty-body]  # as above
    """Decoders, which change how the next token of a text comes about."""


@hookspec
def exporters() -> list[Exporter]:  # type: ignore[empty-body]  # as above
    """Exporters, which write a model in the layout of other tools."""


@hookspec
def architectures() -> list[Architecture]:  # type: ignore[empty-body]  # as above
    """Model families, with the names of their feed-forward, attention, norm and embedding tensors."""


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
