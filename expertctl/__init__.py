"""Train language-model experts apart, merge them into one model.

What users and plugin authors import; everything is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertctl.core.config.project import load_project as load_project
    from expertctl.core.config.settings import TrainingConfig as TrainingConfig
    from expertctl.core.errors import UserError as UserError
    from expertctl.core.hooks.ensembles import Mixer as Mixer
    from expertctl.core.hooks.ensembles import MixingPass as MixingPass
    from expertctl.core.hooks.ensembles import TextMixer as TextMixer
    from expertctl.core.hooks.ensembles import TextState as TextState
    from expertctl.core.hooks.evaluation import Decoder as Decoder
    from expertctl.core.hooks.evaluation import DecoderInputs as DecoderInputs
    from expertctl.core.hooks.evaluation import Division as Division
    from expertctl.core.hooks.evaluation import Evaluator as Evaluator
    from expertctl.core.hooks.evaluation import Exporter as Exporter
    from expertctl.core.hooks.evaluation import ExportInputs as ExportInputs
    from expertctl.core.hooks.evaluation import Metric as Metric
    from expertctl.core.hooks.evaluation import ModelTensors as ModelTensors
    from expertctl.core.hooks.evaluation import SampleChoice as SampleChoice
    from expertctl.core.hooks.evaluation import Score as Score
    from expertctl.core.hooks.events import ExpertFinished as ExpertFinished
    from expertctl.core.hooks.events import MergeFinished as MergeFinished
    from expertctl.core.hooks.events import RunOutcome as RunOutcome
    from expertctl.core.hooks.events import RunTracker as RunTracker
    from expertctl.core.hooks.events import TrackedRun as TrackedRun
    from expertctl.core.hooks.events import Tracker as Tracker
    from expertctl.core.hooks.events import TrainingStep as TrainingStep
    from expertctl.core.hooks.hookspecs import hookimpl as hookimpl
    from expertctl.core.hooks.merging import Assembler as Assembler
    from expertctl.core.hooks.merging import Assembly as Assembly
    from expertctl.core.hooks.merging import AssemblyInputs as AssemblyInputs
    from expertctl.core.hooks.merging import BuiltModel as BuiltModel
    from expertctl.core.hooks.merging import KeptElements as KeptElements
    from expertctl.core.hooks.merging import MergeInputs as MergeInputs
    from expertctl.core.hooks.merging import MergeMethod as MergeMethod
    from expertctl.core.hooks.merging import ModelBuilder as ModelBuilder
    from expertctl.core.hooks.merging import OpenedModel as OpenedModel
    from expertctl.core.hooks.merging import PerExpert as PerExpert
    from expertctl.core.hooks.merging import PlannedTensor as PlannedTensor
    from expertctl.core.hooks.merging import Survey as Survey
    from expertctl.core.hooks.merging import TensorGroup as TensorGroup
    from expertctl.core.hooks.merging import TensorMerge as TensorMerge
    from expertctl.core.hooks.mixtures import Architecture as Architecture
    from expertctl.core.hooks.mixtures import MixtureShape as MixtureShape
    from expertctl.core.hooks.mixtures import MixtureTarget as MixtureTarget
    from expertctl.core.hooks.mixtures import RouterInputs as RouterInputs
    from expertctl.core.hooks.mixtures import RouterRows as RouterRows
    from expertctl.core.hooks.mixtures import RouterStart as RouterStart
    from expertctl.core.hooks.steps import Batch as Batch
    from expertctl.core.hooks.steps import Contents as Contents
    from expertctl.core.hooks.steps import Loss as Loss
    from expertctl.core.hooks.steps import Objective as Objective
    from expertctl.core.hooks.steps import ObjectiveContext as ObjectiveContext
    from expertctl.core.hooks.steps import Optimiser as Optimiser
    from expertctl.core.hooks.steps import TrainingObjective as TrainingObjective
    from expertctl.core.hooks.text import CorpusFormat as CorpusFormat
    from expertctl.core.hooks.text import DiscoveryInputs as DiscoveryInputs
    from expertctl.core.hooks.text import Document as Document
    from expertctl.core.hooks.text import DocumentOrder as DocumentOrder
    from expertctl.core.hooks.text import DomainDiscoverer as DomainDiscoverer
    from expertctl.core.hooks.text import FoundDomains as FoundDomains
    from expertctl.core.hooks.text import ValidationText as ValidationText
    from expertctl.core.hooks.training import Launcher as Launcher
    from expertctl.core.hooks.training import PrivateReleases as PrivateReleases
    from expertctl.core.hooks.training import SideTensor as SideTensor
    from expertctl.core.hooks.training import TrainablePart as TrainablePart
    from expertctl.core.hooks.training import Trainer as Trainer
    from expertctl.core.hooks.training import TrainingContext as TrainingContext
    from expertctl.core.hooks.training import TrainingText as TrainingText
    from expertctl.core.manifests.generalist import GeneralistKind as GeneralistKind
    from expertctl.core.manifests.generalist import MixtureRecord as MixtureRecord
    from expertctl.core.manifests.verification import verify as verify
    from expertctl.core.models.decoding.rows import DecodingRow as DecodingRow
    from expertctl.core.models.decoding.rows import RowsModel as RowsModel
    from expertctl.core.models.decoding.wrapped import WrappedModel as WrappedModel
    from expertctl.core.models.generation import Sampling as Sampling
    from expertctl.core.models.loading import load_model as load_model
    from expertctl.core.models.loading import register_auto_classes as register_auto_classes
    from expertctl.core.process.scheduling import Job as Job
    from expertctl.core.process.scheduling import JobState as JobState
    from expertctl.core.process.scheduling import Scheduler as Scheduler
    from expertctl.core.remote.transfers import Transfer as Transfer
    from expertctl.core.reporting import LaunchResult as LaunchResult
    from expertctl.core.reporting import Reporter as Reporter
    from expertctl.core.text.conversations import Conversation as Conversation
    from expertctl.core.text.token_store import Row as Row
    from expertctl.core.text.token_store import TokenBlocks as TokenBlocks
    from expertctl.core.text.token_store import TokenWindows as TokenWindows
    from expertctl.core.text.token_store import Windows as Windows
    from expertctl.experts.runs.launching import TrainResult as TrainResult
    from expertctl.experts.runs.tuning import TuningSettings as TuningSettings
    from expertctl.experts.text.discovery import DiscoverySettings as DiscoverySettings
    from expertctl.merge.ensemble.routed_mixing import RoutedMixer as RoutedMixer
    from expertctl.merge.merging import MergeRun as MergeRun
    from expertctl.merge.merging import merge_recipe as merge_recipe
    from expertctl.merge.recipes.mergekit_file import read_mergekit as read_mergekit
    from expertctl.workspace import Workspace as Workspace

_HOMES = {
    "core.config.project": "load_project",
    "core.config.settings": "TrainingConfig",
    "core.errors": "UserError",
    "core.hooks.ensembles": "Mixer MixingPass TextMixer TextState",
    "core.hooks.evaluation": "Decoder DecoderInputs Division Evaluator ExportInputs Exporter Metric ModelTensors SampleChoice Score",
    "core.hooks.events": "ExpertFinished MergeFinished RunOutcome RunTracker TrackedRun Tracker TrainingStep",
    "core.hooks.hookspecs": "hookimpl",
    "core.hooks.merging": "Assembler Assembly AssemblyInputs BuiltModel KeptElements MergeInputs MergeMethod ModelBuilder "
    "OpenedModel PerExpert PlannedTensor Survey TensorGroup TensorMerge",
    "core.hooks.mixtures": "Architecture MixtureShape MixtureTarget RouterInputs RouterRows RouterStart",
    "core.process.scheduling": "Job JobState Scheduler",
    "core.hooks.text": "CorpusFormat DiscoveryInputs Document DocumentOrder DomainDiscoverer FoundDomains ValidationText",
    "core.hooks.steps": "Batch Contents Loss Objective ObjectiveContext Optimiser TrainingObjective",
    "core.hooks.training": "Launcher PrivateReleases SideTensor TrainablePart Trainer TrainingContext TrainingText",
    "core.manifests.generalist": "GeneralistKind MixtureRecord",
    "core.manifests.verification": "verify",
    "core.models.decoding.rows": "DecodingRow RowsModel",
    "core.models.decoding.wrapped": "WrappedModel",
    "core.models.generation": "Sampling",
    "core.models.loading": "load_model register_auto_classes",
    "core.remote.transfers": "Transfer",
    "core.reporting": "LaunchResult Reporter",
    "core.text.conversations": "Conversation",
    "core.text.token_store": "Row TokenBlocks TokenWindows Windows",
    "experts.runs.launching": "TrainResult",
    "experts.runs.tuning": "TuningSettings",
    "experts.text.discovery": "DiscoverySettings",
    "merge.ensemble.routed_mixing": "RoutedMixer",
    "merge.merging": "MergeRun merge_recipe",
    "merge.recipes.mergekit_file": "read_mergekit",
    "workspace": "Workspace",
}
"""The names that each module provides; the imports above tell type checkers the same."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)  # one list, above, for both


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'expertctl' has no attribute '{name}'")
    return getattr(importlib.import_module(f"expertctl.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
