"""Guarded replacement of Flower's `flwr-clientapp` command: refuses app bundles that are not on the owner's allowlist.

It precedes Flower's command of the same name on the node's PATH. It patches two names in a module of Flower, which is why the
supported versions of Flower are bounded; if a name is missing, the command fails before it runs anything.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .allowed_bundle import is_allowed

STATE_VARIABLE = "EXPERTCTL_OWNER_STATE"
STATE_SETTING = "state"
"""Key of the node configuration that holds the owner's state folder; it stays on the node."""
NOT_ALLOWED = "APP_NOT_ALLOWED"
FAILED = "FAILED"


def write_shim(state: Path) -> Path:
    """Write the `flwr-clientapp` script that the node finds first on PATH; return its folder."""
    folder = state / "bin"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    shim = folder / "flwr-clientapp"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m {__name__} "$@"\n', encoding="utf-8")
    shim.chmod(0o700)
    return folder


def guard(module: Any, state: Path) -> None:
    """Patch Flower's module to refuse bundles that are not on the allowlist and to report codes instead of messages."""
    install, error = module.install_from_fab, module.Error
    is_refused = False

    def install_allowed(content: bytes, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_refused
        if not is_allowed(content, state):
            is_refused = True
            raise PermissionError(NOT_ALLOWED)
        return install(content, *args, **kwargs)

    def coded_error(code: int, reason: str | None = None) -> Any:
        return error(code, NOT_ALLOWED if is_refused else FAILED)

    module.install_from_fab, module.Error = install_allowed, coded_error


def main() -> None:
    """Run Flower's command with the guard in place."""
    from importlib import import_module

    from flwr.supernode.cli import flwr_clientapp

    guard(import_module("flwr.supernode.runtime.run_clientapp"), Path(os.environ[STATE_VARIABLE]))
    sys.argv[0] = "flwr-clientapp"
    flwr_clientapp()


if __name__ == "__main__":
    main()
