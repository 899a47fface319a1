"""Isolated plugin managers for tests, separate from the manager of the process."""

from __future__ import annotations

from ..hooks.manager import PluginManager


def fresh_plugins(*plugins: object, builtins: bool = True) -> PluginManager:
    """Return a manager with the built-ins and `plugins`: modules, classes or objects with `@hookimpl`.

    Plugin errors are not printed but collected in the manager's `problems`.
    """
    manager = PluginManager(report=lambda problem: None)
    if builtins:
        manager.load_builtins()
    for plugin in plugins:
        manager.register(plugin, getattr(plugin, "__name__", type(plugin).__name__))
    return manager
