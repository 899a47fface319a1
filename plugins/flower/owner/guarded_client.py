"""`flwr-clientapp` as an owner's node runs it: app bundles that the owner's installation does not know are refused unopened.

Stands in front of Flower's own command of that name on the node's PATH. It replaces two names of one module of Flower's, which
is why versions of Flower are bounded; where they are not what they were, it does not run at all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .allowed_bundle import is_allowed

STATE_VARIABLE = "EXPERTCTL_OWNER_STATE"
STATE_SETTING = "state"
"""The setting of a node that names the owner's state folder; it stays on the node."""
NOT_ALLOWED = "APP_NOT_ALLOWED"
FAILED = "FAILED"


def write_shim(state: Path) -> Path:
    """Write the command that a node finds first; return its folder."""
    folder = state / "bin"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    shim = folder / "flwr-clientapp"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m {__name__} "$@"\n', encoding="utf-8")
    shim.chmod(0o700)
    return folder


def guard(module: Any, state: Path) -> None:
    """Make Flower's module refuse bundles that are not on the list, and say codes in the place of words."""
    install, error = module.install_from_fab, module.Error
    refused = []

    def install_allowed(content: bytes, *arguments: Any, **named: Any) -> Any:
        if not is_allowed(content, state):
            refused.append(True)
            raise PermissionError(NOT_ALLOWED)
        return install(content, *arguments, **named)

    def coded_error(code: int, reason: str | None = None) -> Any:
        return error(code, NOT_ALLOWED if refused else FAILED)

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
