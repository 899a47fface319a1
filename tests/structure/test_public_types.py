"""Every type that a hook offers, receives or names in its fields and signatures can be imported from `expertctl`."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import expertctl
from expertctl.core.hooks import hookspecs
from expertctl.core.hooks.manager import OFFER_KINDS

HOOKS = "expertctl.core.hooks."


def core_names(module: str) -> dict[str, str]:
    """Return the public names that a module of the hooks defines or imports from `core`, with the defining module."""
    tree = ast.parse(Path(sys.modules[module].__file__ or "").read_text(encoding="utf-8"))
    names = {node.name: module for node in tree.body if isinstance(node, ast.ClassDef)}
    names |= {
        target.id: module
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module.split(".")[: -node.level]
            names |= {alias.name: ".".join([*base, node.module or ""]) for alias in node.names}
    return {name: home for name, home in names.items() if not name.startswith("_")}


def annotations_of(kind: type) -> Iterator[str]:
    """Yield the annotations of a class: of its fields, and of its methods and properties."""
    yield from map(str, vars(kind).get("__annotations__", {}).values())
    for member in vars(kind).values():
        function = member.fget if isinstance(member, property) else member
        if inspect.isfunction(function):
            yield str(inspect.signature(function))


def named_types() -> dict[str, str]:
    """Return the types of all hooks by name, with their defining modules, and the types that those name in turn."""
    events = [
        parameter
        for spec in vars(hookspecs).values()
        if inspect.isfunction(spec)
        for parameter in re.findall(r"\w+", str(inspect.signature(spec)))
    ]
    kinds = core_names(hookspecs.__name__)
    typed = {name: kinds[name] for name in events if name in kinds}
    waiting = list(typed)
    while waiting:
        kind = getattr(sys.modules.get(typed[waiting[-1]]), waiting.pop(), None)
        if not inspect.isclass(kind) or not kind.__module__.startswith(HOOKS):
            continue  # a type of another folder of `core`, or an alias
        subclasses = {
            child.__name__: child.__module__ for child in kind.__subclasses__() if child.__module__.startswith(HOOKS)
        }
        known = core_names(kind.__module__)
        words = {word for text in annotations_of(kind) for word in re.findall(r"\w+", text)}
        new = subclasses | {name: home for name, home in known.items() if name in words}
        waiting += [name for name in new if name not in typed]
        typed |= new
    return typed


def test_the_types_of_hooks_are_public() -> None:
    named = named_types()
    assert {kind.__name__ for kind in OFFER_KINDS} <= named.keys()
    assert {"TensorGroup", "AssemblyInputs", "PlannedTensor", "TrainablePart", "Reporter", "TextMixer"} <= named.keys()
    assert sorted(named.keys() - set(expertctl.__all__)) == []
