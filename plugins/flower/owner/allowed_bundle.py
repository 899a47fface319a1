"""Allowlist of app bundles for an owner's node: only the bundle of the owner's own installation may run."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from ....core.artefacts.files import read_json, write_json
from ....core.errors import UserError
from ..coordinator.superlink import APP
from ..processes.child import environment, flower_command

ALLOWED_FILE = "allowed-app.json"
MAX_FILES = 50
MAX_BYTES = 1 << 20


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
        result = subprocess.run(
            [flower_command("flwr"), "build", "--app", str(APP)],
            env=environment(folder / "home"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=folder,
            check=False,
        )
        bundles = list(folder.glob("*.fab"))
        if result.returncode != 0 or len(bundles) != 1:
            raise UserError(f"`flwr build` failed: {(result.stderr.strip().splitlines() or ['no reason'])[-1]}")
        digest = digest_of_bundle(bundles[0].read_bytes())
    write_json(state / ALLOWED_FILE, {"sha256": [digest]})
    return digest


def is_allowed(content: bytes, state: Path) -> bool:
    """Return whether a bundle is on the owner's allowlist."""
    try:
        return digest_of_bundle(content) in read_json(state / ALLOWED_FILE)["sha256"]
    except (UserError, KeyError, TypeError):
        return False
