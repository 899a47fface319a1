"""Guarded replacement of Flower's `flwr-clientapp` command: refuses app bundles that are not on the owner's allowlist.

The only bundle on the list is that of the owner's own installation. The command precedes Flower's command of the same name on the
node's PATH. It patches two names in a module of Flower, which is why the supported versions of Flower are bounded; if a name is
missing, the command fails before it runs anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ....core.artefacts.files import read_json, write_json
from ....core.errors import UserError
from ..coordinator.superlink import APP
from ..processes.child import environment, last_line, run_flwr

ALLOWED_FILE = "allowed-app.json"
MAX_FILES = 50
MAX_BYTES = 1 << 20
STATE_VARIABLE = "EXPERTCTL_OWNER_STATE"
STATE_SETTING = "state"
"""Key of the node configuration that holds the owner's state folder; it stays on the node."""
NOT_ALLOWED = "APP_NOT_ALLOWED"
FAILED = "FAILED"


def digest_of_bundle(content: bytes) -> str:
    """Return a digest of a bundle's file names and contents, independent of the compression.

    Raises `UserError` for anything but a zip archive, for duplicate or unsafe names and for a bundle that is too large.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_FILES or sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise UserError(f"the app bundle exceeds {MAX_FILES} files or {MAX_BYTES:,} bytes")
            digests = {entry.filename: hashlib.sha256(archive.read(entry)).hexdigest() for entry in entries}
    except (zipfile.BadZipFile, RuntimeError, EOFError, NotImplementedError):
        raise UserError("the app bundle is not a zip archive") from None
    if len(digests) != len(entries) or any(name.startswith("/") or ".." in name or "\\" in name for name in digests):
        raise UserError("the app bundle has a file name twice or a path outside the bundle")
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def write_allowed(state: Path) -> str:
    """Build the installed package's bundle, store its digest as the only allowed one and return it."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result = run_flwr("build", "--app", str(APP), environment=environment(folder / "home"), folder=folder)
        bundles = list(folder.glob("*.fab"))
        if result.returncode != 0 or len(bundles) != 1:
            raise UserError(f"`flwr build` failed: {last_line(result.stderr)}")
        digest = digest_of_bundle(bundles[0].read_bytes())
    write_json(state / ALLOWED_FILE, {"sha256": [digest]})
    return digest


def is_allowed(content: bytes, state: Path) -> bool:
    """Return whether a bundle is on the owner's allowlist."""
    try:
        return digest_of_bundle(content) in read_json(state / ALLOWED_FILE)["sha256"]
    except (UserError, KeyError, TypeError):
        return False


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
