"""Plugins are found, checked and kept apart: a broken one is one line on standard error and stops nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from expertctl import Evaluator, MergeFinished, MergeMethod, TensorMerge, Trainer, hookimpl
from expertctl.core.errors import UserError
from expertctl.core.hooks.manager import BUILTIN_PLUGINS, PluginManager, PluginProblem, installed_plugins
from expertctl.core.hooks.text import CorpusFormat
from expertctl.core.hooks.training import Launcher
from expertctl.core.models.architectures import architecture_of
from expertctl.core.testing import fresh_plugins


def method(name: str) -> MergeMethod:
    return TensorMerge(name, "for a test", merge=lambda group, options: group.seed)


def offering(function: Callable[..., Any], hook: str = "merge_methods") -> ModuleType:
    """A plugin module with one hook."""
    module = ModuleType("tested")
    setattr(module, hook, hookimpl(function))
    return module


def nothing() -> list[Any]:
    return []


def problems(manager: PluginManager) -> list[str]:
    return [problem.reason for problem in manager.problems]


# --- what works ---


def test_the_built_ins_load_without_a_problem_and_offer_what_the_method_needs() -> None:
    manager = fresh_plugins()
    assert set(manager.offers(MergeMethod)) >= {"average", "ensemble"}
    assert set(manager.offers(Trainer)) >= {"all", "feed_forward"}
    assert set(manager.offers(Launcher)) >= {"local"}
    assert set(manager.offers(CorpusFormat)) >= {"jsonl", "text", "parquet"}
    assert set(manager.offers(Evaluator)) >= {"perplexity"}
    assert {info.name for info in manager.plugins()} == {path.rpartition(".")[2] for path in BUILTIN_PLUGINS}
    assert {info.distribution for info in manager.plugins()} == {"expertctl"}
    assert manager.problems == []


def test_a_plugin_adds_to_the_built_ins() -> None:
    manager = fresh_plugins(offering(lambda: [method("mine")]))
    assert manager.offer(MergeMethod, "mine").summary == "for a test"
    assert "average" in manager.offers(MergeMethod)
    provider = manager.provider(MergeMethod, "mine")
    assert (provider.name, provider.distribution, provider.hooks) == ("tested", "local", ("merge_methods",))
    assert manager.provider(MergeMethod, "average").distribution == "expertctl"


def test_a_plugin_registered_late_is_seen() -> None:
    manager = fresh_plugins()
    assert "mine" not in manager.offers(MergeMethod)
    assert manager.register(offering(lambda: [method("mine")]), "late")
    assert "mine" in manager.offers(MergeMethod)


def test_a_hook_may_have_a_function_of_another_name() -> None:
    class Plugin:
        @hookimpl(specname="merge_methods")
        def offer(self) -> list[MergeMethod]:
            return [method("mine")]

    assert fresh_plugins(Plugin()).offer(MergeMethod, "mine")


def test_hooks_are_asked_once() -> None:
    asked: list[int] = []

    def offer() -> list[MergeMethod]:
        asked.append(1)
        return [method("mine")]

    manager = fresh_plugins(offering(offer))
    for _ in range(3):
        manager.offer(MergeMethod, "mine")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (
            lambda m: m.offer(MergeMethod, "avrage"),
            r"no merge method 'avrage' \(did you mean 'average'\?\); installed: .*average",
        ),
        (
            lambda m: m.offer(Trainer, "al"),
            r"no trainer 'al' \(did you mean 'all'\?\); installed: all, .*feed_forward",
        ),
        (lambda m: m.offer(Launcher, "kube"), "no launcher 'kube'; installed: local, ray, slurm"),
        (lambda m: m.offer(Evaluator, "x"), "no evaluator 'x'; installed: perplexity"),
    ],
)
def test_an_unknown_name_is_refused_with_the_choices(ask: Callable[[PluginManager], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ask(fresh_plugins())


def test_families_are_found_by_their_model_type() -> None:
    assert architecture_of("olmo2").mixtures[0].model_class == "FlexOlmoForCausalLM"
    assert architecture_of("gemma2").name == "gemma"


# --- what does not ---


def test_a_misspelt_hook_is_named_with_the_nearest_one() -> None:
    manager = fresh_plugins(offering(nothing, "merge_method"))
    assert problems(manager) == ["there is no hook 'merge_method' (did you mean 'merge_methods'?)"]
    assert "average" in manager.offers(MergeMethod)


def test_a_hook_that_is_nothing_like_any_is_named_with_all_of_them() -> None:
    (reason,) = problems(fresh_plugins(offering(nothing, "zzz")))
    assert reason.startswith("there is no hook 'zzz'; hooks: architectures, corpus_formats")


def test_a_plugin_without_hooks_is_asked_whether_the_mark_is_missing() -> None:
    assert problems(fresh_plugins(ModuleType("empty"))) == ["implements no hook (is `@hookimpl` missing?)"]


def test_an_argument_that_a_hook_does_not_have_is_named() -> None:
    (reason,) = problems(fresh_plugins(offering(lambda event, other: None, "merge_finished")))
    assert "other" in reason
    assert "\n" not in reason


def test_a_hook_wrapper_is_refused_since_hooks_are_called_one_by_one() -> None:
    class Plugin:
        @hookimpl(wrapper=True)
        def merge_methods(self) -> Any:
            return (yield)

    assert problems(fresh_plugins(Plugin())) == ["'merge_methods' is a hook wrapper; plain hooks only"]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "merge_methods returned a NoneType, not a list of MergeMethod"),
        (method("x"), "merge_methods returned a TensorMerge, not a list of MergeMethod"),
        ({"x": method("x")}, "merge_methods returned a dict, not a list of MergeMethod"),
        ((item for item in ()), "merge_methods returned a generator, not a list of MergeMethod"),
        (["x"], "merge_methods returned a str in its list, not MergeMethod"),
        ([Evaluator("x", "", (), print)], "merge_methods returned a Evaluator in its list, not MergeMethod"),
        ([TensorMerge(3, "", merge=print)], "merge_methods offers something called 3, which is no name"),
        (
            [TensorMerge(["x"], "", merge=print)],
            "merge_methods offers something called ['x'], which is no name",
        ),
        ([TensorMerge("", "", merge=print)], "merge_methods offers something called '', which is no name"),
    ],
)
def test_a_wrong_return_value_is_named(returned: Any, said: str) -> None:
    manager = fresh_plugins(offering(lambda: returned))
    assert "average" in manager.offers(MergeMethod)
    assert problems(manager) == [said]


def test_a_good_item_beside_a_bad_one_is_kept() -> None:
    manager = fresh_plugins(offering(lambda: ["x", method("mine")]))
    assert "mine" in manager.offers(MergeMethod)
    assert len(manager.problems) == 1


def test_a_taken_name_stays_with_its_first_plugin() -> None:
    manager = fresh_plugins(offering(lambda: [method("average"), method("mine")]))
    assert manager.offer(MergeMethod, "average").summary != "for a test"
    assert "mine" in manager.offers(MergeMethod)
    assert problems(manager) == ["merge_methods offers 'average', a name that plugin 'btm' has taken"]


@pytest.mark.parametrize("order", [{"trylast": True}, {"tryfirst": True}], ids=str)
def test_no_plugin_can_take_a_name_by_coming_first(order: dict[str, bool]) -> None:
    class Plugin:
        @hookimpl(**order)
        def merge_methods(self) -> list[MergeMethod]:
            return [method("average")]

    manager = fresh_plugins(Plugin())
    assert manager.provider(MergeMethod, "average").distribution == "expertctl"
    assert len(manager.problems) == 1


def test_a_plugin_name_that_is_taken_is_refused() -> None:
    manager = fresh_plugins()
    assert not manager.register(offering(lambda: [method("mine")]), "btm", distribution="another")
    assert [str(problem) for problem in manager.problems] == [
        "plugin 'btm' (another): a plugin of that name is already loaded"
    ]
    assert manager.provider(MergeMethod, "average").distribution == "expertctl"


def test_a_second_try_after_a_broken_plugin_of_the_same_name_counts() -> None:
    manager = fresh_plugins()
    manager.register(ModuleType("empty"), "x", distribution="broken")
    assert manager.register(offering(lambda: [method("mine")]), "x", distribution="good", version="2")
    assert manager.provider(MergeMethod, "mine").distribution == "good"


def test_a_hook_that_raises_is_named_and_the_rest_keeps_working() -> None:
    def fail() -> list[MergeMethod]:
        raise RuntimeError("first line\nsecond line")

    manager = fresh_plugins(offering(fail))
    assert "average" in manager.offers(MergeMethod)
    assert problems(manager) == ["merge_methods failed: RuntimeError: first line second line"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: MergeMethod("x", ""),
            "merge method 'x' is a plain MergeMethod; use TensorMerge, Assembler or ModelBuilder",
        ),
        (
            lambda: TensorMerge("x", "", merge=print, options=dict),
            "options of merge method 'x' must be a dataclass",
        ),
        (lambda: Trainer("x", "", prepare=print, options=int), "options of trainer 'x' must be a dataclass"),
    ],
)
def test_an_offer_that_cannot_work_is_named(make: Callable[[], Any], said: str) -> None:
    hook = "trainers" if "trainer" in said else "merge_methods"
    manager = fresh_plugins(offering(lambda: [make()], hook))
    manager.offers(Trainer)
    manager.offers(MergeMethod)
    assert problems(manager) == [f"{hook} failed: ValueError: {said}"]


def test_a_built_in_that_fails_is_our_bug_and_is_raised() -> None:
    manager = PluginManager(report=lambda problem: None)
    manager.register(offering(lambda: 1 / 0), "ours", distribution="expertctl")
    with pytest.raises(ZeroDivisionError):
        manager.offers(MergeMethod)


# --- telling plugins ---

EVENT = MergeFinished("m", Path("m"), "average")


def test_every_plugin_is_told() -> None:
    told: list[Any] = []
    first = offering(lambda event: told.append(("first", event)), "merge_finished")
    second = ModuleType("second")
    second.merge_finished = hookimpl(lambda: told.append("second, which takes no argument"))
    fresh_plugins(first, second).merge_finished(EVENT)
    assert told == [("first", EVENT), "second, which takes no argument"]


def test_a_failing_event_hook_is_reported_once_and_stops_no_other() -> None:
    calls: list[int] = []

    def fail(event: MergeFinished) -> None:
        calls.append(1)
        raise RuntimeError(f"different every time: {len(calls)}")

    told: list[Any] = []
    other = ModuleType("other")
    other.merge_finished = hookimpl(lambda event: told.append(event))
    manager = fresh_plugins(offering(fail, "merge_finished"), other)
    for _ in range(3):
        manager.merge_finished(EVENT)
    assert len(calls) == len(told) == 3
    assert problems(manager) == ["merge_finished failed: RuntimeError: different every time: 1"]


def test_an_interruption_goes_through() -> None:
    def interrupt(event: MergeFinished) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fresh_plugins(offering(interrupt, "merge_finished")).merge_finished(EVENT)


def test_commands_are_added_to_the_group() -> None:
    import click

    group = click.Group("expertctl")
    fresh_plugins(offering(lambda cli: cli.add_command(click.Command("mine")), "register_commands")).register_commands(
        group
    )
    assert "mine" in group.commands


def test_a_problem_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    manager = PluginManager()
    manager.register(ModuleType("empty"), "x", distribution="some-dist")
    manager.register(ModuleType("empty"), "x", distribution="some-dist")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        "Warning: plugin 'x' (some-dist): implements no hook (is `@hookimpl` missing?); "
        "the rest keeps working, see `expertctl doctor`\n"
    )


# --- installed distributions ---

SOURCES = {
    "good": "from expertctl import TensorMerge, hookimpl\n"
    "@hookimpl\n"
    "def merge_methods(): return [TensorMerge('good', '', merge=print)]\n",
    "broken": "import no_such_module_anywhere\n",
    "quits": "import sys\nsys.exit(3)\n",
    "misspelt": "from expertctl import hookimpl\n@hookimpl\ndef trainer(): return []\n",
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder as pip would leave it after installing one distribution for each source."""
    for name, source in SOURCES.items():
        (tmp_path / f"plugin_of_{name}.py").write_text(source)
        info = tmp_path / f"dist_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[expertctl]\n{name} = plugin_of_{name}\n")
    return tmp_path


@dataclass
class Loaded:
    names: set[str]
    problems: list[PluginProblem]


@pytest.fixture
def load(site: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], Loaded]:
    monkeypatch.syspath_prepend(str(site))

    def load(selection: str | None) -> Loaded:
        if selection is None:
            monkeypatch.delenv("EXPERTCTL_PLUGINS", raising=False)
        else:
            monkeypatch.setenv("EXPERTCTL_PLUGINS", selection)
        manager = PluginManager(report=lambda problem: None)
        manager.load_entry_points()
        return Loaded({info.name for info in manager.plugins()}, manager.problems)

    return load


def test_installed_plugins_are_found_and_broken_ones_named_in_a_fresh_process(site: Path) -> None:
    script = (
        "import json\n"
        "from expertctl import MergeMethod\n"
        "from expertctl.core.hooks.manager import installed_plugins\n"
        "m = installed_plugins()\n"
        "print(json.dumps([sorted(m.offers(MergeMethod)), m.provider(MergeMethod, 'good').version]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "EXPERTCTL_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    methods, version = json.loads(done.stdout)
    assert {"average", "ensemble", "good"} <= set(methods)
    assert version == "1.0"
    told = [line for line in done.stderr.splitlines() if "dist-" in line]
    assert len(told) == 3
    assert "plugin 'broken' (dist-broken): cannot be imported: ModuleNotFoundError: No module named" in told[0]
    assert "plugin 'misspelt' (dist-misspelt): there is no hook 'trainer' (did you mean 'trainers'?)" in told[1]
    assert "plugin 'quits' (dist-quits): cannot be imported: SystemExit: 3" in told[2]


def test_just_the_selected_plugins_are_loaded(load: Callable[[str | None], Loaded]) -> None:
    loaded = load(" good , ")
    assert (loaded.names, loaded.problems) == ({"good"}, [])
    assert len(load("good,broken").problems) == 1


def test_an_empty_selection_loads_none(load: Callable[[str | None], Loaded]) -> None:
    assert load("") == Loaded(set(), [])


def test_a_selected_plugin_that_is_not_installed_is_named(load: Callable[[str | None], Loaded]) -> None:
    (problem,) = load("goood").problems
    assert str(problem) == "plugin 'goood' (EXPERTCTL_PLUGINS): is selected but not installed (did you mean 'good'?)"


def test_the_process_has_one_manager() -> None:
    assert installed_plugins() is installed_plugins()
