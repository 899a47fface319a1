"""The plugin manager: loads plugins, isolates the broken ones, and gives typed access to their offers.

Only this module touches pluggy's hooks; other code calls it, as in `installed_plugins().offer(MergeMethod, "average")`.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from ..artefacts.versions import package_version
from ..errors import did_you_mean, unknown_name
from . import hookspecs
from .ensembles import Mixer
from .evaluation import Decoder, Evaluator, Exporter
from .events import ExpertFinished, MergeFinished, Tracker, TrainingStep
from .merging import MergeMethod
from .mixtures import Architecture, RouterStart
from .steps import Objective, Optimiser
from .text import CorpusFormat, DocumentOrder, DomainDiscoverer
from .training import Launcher, Trainer

if TYPE_CHECKING:
    import click

ENTRY_POINT_GROUP = "expertctl"
SELECTION_VARIABLE = "EXPERTCTL_PLUGINS"

# Named by string, so that `core` does not import plugins.
BUILTIN_PLUGINS = (
    "basics.architectures",
    "basics.conversation_files",
    "basics.corpus_files",
    "basics.distillation",
    "basics.in_context_order",
    "basics.infilling",
    "basics.next_token",
    "basics.optimisers",
    "basics.perplexity",
    "basics.preferences",
    "basics.trainable_parts",
    "decoders.best_of",
    "decoders.context_aware",
    "decoders.contrastive",
    "decoders.experts_against_seed",
    "decoders.knn",
    "decoders.replug",
    "decoders.sinks",
    "exporters.gguf",
    "exporters.huggingface",
    "flower",
    "launchers.local",
    "launchers.ray",
    "launchers.slurm",
    "methods.btm",
    "methods.bts",
    "methods.btx",
    "methods.cbtm",
    "methods.demix",
    "methods.dense_merges",
    "methods.flexolmo",
    "methods.lora",
    "methods.mixture_tuning",
    "methods.mixtures",
    "methods.prompts",
    "trackers.mlflow",
    "trackers.tensorboard",
    "trackers.trackio",
    "trackers.wandb",
)

Offer = TypeVar("Offer")

OFFER_KINDS: Mapping[type, str] = {
    MergeMethod: "merge_methods",
    Mixer: "mixers",
    RouterStart: "router_starts",
    Trainer: "trainers",
    Objective: "objectives",
    Optimiser: "optimisers",
    Launcher: "launchers",
    Tracker: "trackers",
    CorpusFormat: "corpus_formats",
    DomainDiscoverer: "domain_discoverers",
    DocumentOrder: "document_orders",
    Evaluator: "evaluators",
    Decoder: "decoders",
    Exporter: "exporters",
    Architecture: "architectures",
}
"""All kinds of offers, with the hook that returns a list of them."""


def noun_of(kind: type) -> str:
    """Return the name of a kind of offer in messages, such as `merge method`."""
    return OFFER_KINDS[kind].removesuffix("s").replace("_", " ")


@dataclass(frozen=True)
class PluginInfo:
    """One loaded plugin: its distribution and the hooks that it implements."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]


@dataclass(frozen=True)
class PluginProblem:
    """Why a plugin, or one of its offers, is not in use."""

    plugin: str
    distribution: str
    reason: str

    def __str__(self) -> str:
        return f"plugin '{self.plugin}' ({self.distribution}): {self.reason}"


def _print_problem(problem: PluginProblem) -> None:
    print(f"Warning: {problem}; the rest keeps working, see `expertctl doctor`", file=sys.stderr)


class PluginManager:
    """The plugins of one process; a new manager, as tests make them, has only those registered on it."""

    def __init__(self, report: Callable[[PluginProblem], None] = _print_problem) -> None:
        self._pm = pluggy.PluginManager(hookspecs.PROJECT)
        self._pm.add_hookspecs(hookspecs)
        self._distributions: dict[str, tuple[str, str]] = {}
        self._report = report
        self._offers: dict[str, dict[str, Any]] = {}
        self._owners: dict[tuple[str, str], str] = {}
        self._failed: set[tuple[str, str]] = set()
        self.problems: list[PluginProblem] = []

    # --- loading ---

    def load_builtins(self) -> None:
        """Register the built-in plugins. A failure here is our bug and is raised."""
        package = __name__.rpartition(".core.")[0]
        version = package_version(hookspecs.PROJECT)
        for path in BUILTIN_PLUGINS:
            module = importlib.import_module(f"{package}.plugins.{path}")
            name = path.rpartition(".")[2]
            self._distributions[name] = (hookspecs.PROJECT, version)
            self._pm.register(module, name)

    def load_entry_points(self) -> None:
        """Register third-party plugins; `EXPERTCTL_PLUGINS` restricts them to a list (`a,b`; empty: none)."""
        from importlib.metadata import entry_points

        selection = os.environ.get(SELECTION_VARIABLE)
        wanted = None if selection is None else {name.strip() for name in selection.split(",") if name.strip()}
        points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
        for point in points:
            if wanted is not None and point.name not in wanted:
                continue
            distribution = point.dist.name if point.dist else "unknown distribution"
            version = point.dist.version if point.dist else "?"
            try:
                module = point.load()
            except (Exception, SystemExit) as error:  # must not stop the others
                self._add_problem(point.name, f"cannot be imported: {_one_line(error)}", distribution)
                continue
            self.register(module, point.name, distribution=distribution, version=version)
        for name in sorted((wanted or set()) - {point.name for point in points}):
            hint = did_you_mean(name, [point.name for point in points])
            self._add_problem(name, f"is selected but not installed{hint}", SELECTION_VARIABLE)

    def register(
        self, plugin: ModuleType | object, name: str, *, distribution: str = "local", version: str = "?"
    ) -> bool:
        """Check and register one plugin; returns whether it is in use. A problem is reported, never raised."""
        reason = self._why_not(plugin, name)
        if reason is None:
            try:
                self._pm.register(plugin, name)
            except (pluggy.PluginValidationError, ValueError) as error:
                # pluggy may leave a plugin half registered when an argument is wrong
                if self._pm.has_plugin(name):
                    self._pm.unregister(name=name)
                reason = _one_line(error)
        if reason is not None:
            self._add_problem(name, reason, distribution)
            return False
        self._distributions[name] = (distribution, version)
        self._offers.clear()
        return True

    def _why_not(self, plugin: object, name: str) -> str | None:
        if self._pm.has_plugin(name):
            return "a plugin of that name is already loaded"
        known = {key for key in vars(hookspecs) if hasattr(self._pm.hook, key) and key[0] != "_"}
        implemented = [
            (options.get("specname") or key, options)
            for key in dir(plugin)
            if (options := self._pm.parse_hookimpl_opts(plugin, key)) is not None
        ]
        for hook, options in implemented:
            if options.get("wrapper") or options.get("hookwrapper"):
                return f"'{hook}' is a hook wrapper; plain hooks only"
            if hook not in known:
                hint = did_you_mean(hook, known, f"; hooks: {', '.join(sorted(known))}")
                return f"there is no hook '{hook}'{hint}"
        return None if implemented else "implements no hook (is `@hookimpl` missing?)"

    def _add_problem(self, plugin: str, reason: str, distribution: str | None = None) -> None:
        problem = PluginProblem(plugin, distribution or self._distributions[plugin][0], reason)
        if problem not in self.problems:
            self.problems.append(problem)
            self._report(problem)

    def plugins(self) -> list[PluginInfo]:
        """Return every plugin in use, in order of loading."""
        plugins = []
        for name, plugin in self._pm.list_name_plugin():
            hooks = tuple(sorted(caller.name for caller in self._pm.get_hookcallers(plugin) or []))
            plugins.append(PluginInfo(name, *self._distributions[name], hooks))
        return plugins

    # --- what plugins offer ---

    def offers(self, kind: type[Offer]) -> Mapping[str, Offer]:
        """Return all offers of one kind by name, such as `offers(MergeMethod)`; those of the built-ins come first."""
        hook = OFFER_KINDS[kind]
        if hook not in self._offers:
            self._offers[hook] = self._collect(hook, kind)
        return self._offers[hook]

    def offer(self, kind: type[Offer], name: str) -> Offer:
        """Return one offer; raises `UserError` that lists the choices."""
        offers = self.offers(kind)
        if name not in offers:
            raise unknown_name(noun_of(kind), name, offers, listed_as="installed")
        return offers[name]

    def provider(self, kind: type, name: str) -> PluginInfo:
        """Return the plugin that brought one offer."""
        self.offers(kind)
        plugin = self._owners[OFFER_KINDS[kind], name]
        return next(info for info in self.plugins() if info.name == plugin)

    def report_failure(self, kind: type, name: str, action: str, error: Exception) -> None:
        """Report that a third party's offer failed at `action`; the failure of a built-in is our bug and is raised."""
        self._report_failure(self.provider(kind, name).name, action, error)

    def _report_failure(self, plugin: str, action: str, error: Exception) -> None:
        if self._distributions[plugin][0] == hookspecs.PROJECT:
            raise error
        self._add_problem(plugin, f"{action} failed: {_one_line(error)}")

    def _collect(self, hook: str, kind: type[Offer]) -> dict[str, Offer]:
        """Call a collecting hook plugin by plugin, and keep the offers that are of the right type and new."""
        offers: dict[str, Offer] = {}
        loaded = list(self._distributions)  # the built-ins first, whatever order a plugin asks for
        implementations = getattr(self._pm.hook, hook).get_hookimpls()
        for implementation in sorted(implementations, key=lambda hookimpl: loaded.index(hookimpl.plugin_name)):
            plugin = implementation.plugin_name
            try:
                items = implementation.function()
            except Exception as error:
                self._report_failure(plugin, hook, error)
                continue
            if not isinstance(items, list | tuple):
                self._add_problem(plugin, f"{hook} returned a {type(items).__name__}, not a list of {kind.__name__}")
                continue
            for item in items:
                if not isinstance(item, kind):
                    reason = f"{hook} returned a {type(item).__name__} in its list, not {kind.__name__}"
                elif not isinstance(name := item.name, str) or not name:  # type: ignore[attr-defined]  # all have one
                    reason = f"{hook} offers something called {name!r}, which is no name"
                elif name in offers:
                    reason = f"{hook} offers '{name}', a name that plugin '{self._owners[hook, name]}' has taken"
                else:
                    offers[name], self._owners[hook, name] = item, plugin
                    continue
                self._add_problem(plugin, reason)
        return offers

    # --- notifying plugins ---

    def training_step(self, event: TrainingStep) -> None:
        self._notify("training_step", event=event)

    def expert_finished(self, event: ExpertFinished) -> None:
        self._notify("expert_finished", event=event)

    def merge_finished(self, event: MergeFinished) -> None:
        self._notify("merge_finished", event=event)

    def register_commands(self, cli: click.Group) -> None:
        self._notify("register_commands", cli=cli)

    def _notify(self, hook: str, **arguments: Any) -> None:
        """Call a hook of every plugin; a plugin that fails is reported once and does not stop the work."""
        for implementation in getattr(self._pm.hook, hook).get_hookimpls():
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except Exception as error:
                plugin = implementation.plugin_name
                if (plugin, hook) not in self._failed:  # its next error may be worded otherwise
                    self._failed.add((plugin, hook))
                    self._add_problem(plugin, f"{hook} failed: {_one_line(error)}")


@functools.cache
def installed_plugins() -> PluginManager:
    """Return this process's plugins: the built-ins and every installed distribution's, loaded once."""
    manager = PluginManager()
    manager.load_builtins()
    manager.load_entry_points()
    return manager


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
