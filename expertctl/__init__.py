"""Train language-model experts apart, merge them into one model.

What users and plugin authors import; everything is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertctl.core.config import load_project as load_project
    from expertctl.core.errors import UserError as UserError
    from expertctl.core.hookspecs import hookimpl as hookimpl
    from expertctl.core.lineage import verify as verify
    from expertctl.core.loading import load_model as load_model
    from expertctl.core.loading import register_auto_classes as register_auto_classes
    from expertctl.core.token_store import TokenBlocks as TokenBlocks
    from expertctl.core.types import Architecture as Architecture
    from expertctl.core.types import BuiltModel as BuiltModel
    from expertctl.core.types import CorpusFormat as CorpusFormat
    from expertctl.core.types import DiscoveryInputs as DiscoveryInputs
    from expertctl.core.types import Document as Document
    from expertctl.core.types import DocumentOrder as DocumentOrder
    from expertctl.core.types import DomainDiscoverer as DomainDiscoverer
    from expertctl.core.types import Evaluator as Evaluator
    from expertctl.core.types import ExpertFinished as ExpertFinished
    from expertctl.core.types import FoundDomains as FoundDomains
    from expertctl.core.types import Launcher as Launcher
    from expertctl.core.types import LaunchResult as LaunchResult
    from expertctl.core.types import MergeFinished as MergeFinished
    from expertctl.core.types import MergeInputs as MergeInputs
    from expertctl.core.types import MergeMethod as MergeMethod
    from expertctl.core.types import MixtureShape as MixtureShape
    from expertctl.core.types import MixtureTarget as MixtureTarget
    from expertctl.core.types import PerExpert as PerExpert
    from expertctl.core.types import PrivateReleases as PrivateReleases
    from expertctl.core.types import Router as Router
    from expertctl.core.types import RouterInputs as RouterInputs
    from expertctl.core.types import RouterStart as RouterStart
    from expertctl.core.types import RunReporter as RunReporter
    from expertctl.core.types import Score as Score
    from expertctl.core.types import TensorGroup as TensorGroup
    from expertctl.core.types import TrainablePart as TrainablePart
    from expertctl.core.types import Trainer as Trainer
    from expertctl.core.types import TrainingStep as TrainingStep
    from expertctl.core.types import TrainingText as TrainingText
    from expertctl.core.types import ValidationText as ValidationText
    from expertctl.merge.mergekit_file import read_mergekit as read_mergekit
    from expertctl.merge.merging import MergeRun as MergeRun
    from expertctl.merge.merging import merge_recipe as merge_recipe
    from expertctl.workspace import Workspace as Workspace

_HOMES = {
    "core.config": ("load_project",),
    "core.errors": ("UserError",),
    "core.hookspecs": ("hookimpl",),
    "core.lineage": ("verify",),
    "core.loading": ("load_model", "register_auto_classes"),
    "core.token_store": ("TokenBlocks",),
    "core.types": (
        "Architecture",
        "BuiltModel",
        "CorpusFormat",
        "DiscoveryInputs",
        "Document",
        "DocumentOrder",
        "DomainDiscoverer",
        "Evaluator",
        "ExpertFinished",
        "FoundDomains",
        "LaunchResult",
        "Launcher",
        "MergeFinished",
        "MergeInputs",
        "MergeMethod",
        "MixtureShape",
        "MixtureTarget",
        "PerExpert",
        "PrivateReleases",
        "Router",
        "RouterInputs",
        "RouterStart",
        "RunReporter",
        "Score",
        "TensorGroup",
        "TrainablePart",
        "Trainer",
        "TrainingStep",
        "TrainingText",
        "ValidationText",
    ),
    "merge.mergekit_file": ("read_mergekit",),
    "merge.merging": ("MergeRun", "merge_recipe"),
    "workspace": ("Workspace",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # one list, above, for both


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'expertctl' has no attribute '{name}'")
    return getattr(importlib.import_module(f"expertctl.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
