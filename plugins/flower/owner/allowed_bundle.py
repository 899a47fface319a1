"""Which app bundles an owner's node may run: those whose files are the files of the owner's own installation."""

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
    """Return a digest of a bundle's file names and contents; how they were packed does not matter, as zlib differs.

    Raises `UserError` for what is no archive, for a name that comes twice or leads outside, and for far too much.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_FILES or sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise UserError("the app bundle is larger than this version's")
            found = {entry.filename: hashlib.sha256(archive.read(entry)).hexdigest() for entry in entries}
    except (zipfile.BadZipFile, RuntimeError, EOFError, NotImplementedError):
        raise UserError("the app bundle is no archive") from None
    if len(found) != len(entries) or any(
        name.startswith("/") or ".." in name or "\\" in name for name in found
    ):
        raise UserError("the app bundle names a file twice or outside of itself")
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def write_allowed(state: Path) -> str:
    """Build the bundle of the installed package and note its digest as the only one that may run; return it."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        done = subprocess.run(
            [flower_command("flwr"), "build", "--app", str(APP)],
            env=environment(folder / "home"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=folder,
            check=False,
        )
        bundles = list(folder.glob("*.fab"))
        if done.returncode != 0 or len(bundles) != 1:
            raise UserError(f"`flwr build` failed: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        digest = digest_of_bundle(bundles[0].read_bytes())
    write_json(state / ALLOWED_FILE, {"sha256": [digest]})
    return digest


def is_allowed(content: bytes, state: Path) -> bool:
    """Tell whether a bundle is on the owner's list."""
    try:
        return digest_of_bundle(content) in read_json(state / ALLOWED_FILE)["sha256"]
    except (UserError, KeyError, TypeError):
        return False
