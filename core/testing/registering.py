"""Plugins on a manager of their own, so that a test never touches those of the process."""

from __future__ import annotations

from ..hooks.manager import PluginManager


def fresh_plugins(*plugins: object, builtins: bool = True) -> PluginManager:
    """Return a manager with the built-ins and the given plugins: modules, classes or objects with `@hookimpl`.

    What is wrong with a plugin is not printed; it lies in the manager's `problems`.
    """
    manager = PluginManager(report=lambda problem: None)
    if builtins:
        manager.load_builtins()
    for plugin in plugins:
        manager.register(plugin, getattr(plugin, "__name__", type(plugin).__name__))
    return manager
