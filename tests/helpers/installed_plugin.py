"""A plugin as users install it: a distribution with an entry point, without pip."""

from __future__ import annotations

import os
from pathlib import Path


def installed_plugin(folder: Path, name: str, code: str) -> dict[str, str]:
    """Install a plugin into a folder; return an environment in which Python finds it."""
    folder.mkdir()
    (folder / f"plugin_of_{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[expertctl]\n{name} = plugin_of_{name}\n")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "EXPERTCTL_PLUGINS": name}
