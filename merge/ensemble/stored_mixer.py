"""Restores the mixer that an ensemble's `config.json` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.hooks.ensembles import Mixer, TextMixer
from ...core.hooks.manager import installed_plugins


def stored_mixer(name: str | None, settings: Mapping[str, Any] | None, folder: Path | None) -> TextMixer:
    """Return the mixer, whose files are in `folder`; raises `UserError` for an older format and a missing plugin."""
    if not name or not settings:
        where = folder if folder is not None else "the configuration of the ensemble"
        raise UserError(f"{where} has no mixer_settings, as ensembles of older versions; merge the ensemble again")
    return installed_plugins().offer(Mixer, name).read(settings, folder)
