"""Resolves the models and dtypes of a mergekit configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.artefacts.hub_cache import cached_model, download_command, is_hub_name, split_revision
from ...core.artefacts.numeric import dtype_of_word
from ...core.errors import UserError


@dataclass(frozen=True)
class _Located:
    """The folder of a model that a file names."""

    folder: Path
    names: tuple[str, ...]
    """Names for the model, preferred first."""
    reference: str | None
    """Its name on the hub with the commit, or its relative path; None for absolute paths."""


class NamedModels:
    """Models of a file by unique name.

    A model is the output of another document of the file (`stages`: name -> folder), a folder relative to the current
    folder or to the folder of the file, or a model in the Hugging Face cache (`owner/name`, `owner/name@revision`).
    """

    def __init__(self, path: Path, lines: Mapping[Any, int], stages: Mapping[str, Path] | None = None) -> None:
        self.path, self.lines = path, lines
        self.models: dict[str, Path] = {}
        self.adapter_bases: dict[str, Path] = {}
        self.references: dict[str, str] = {}
        self._stages = stages or {}
        self.used_stages: set[str] = set()

    def model(self, reference: Any, key: tuple[Any, ...]) -> str:
        """Register a model (`A+B`, `{model, lora}`: adapter on model); return its name, or raise `UserError`."""
        text, adapter = self._split(reference, key)
        model = self._locate(text, key)
        if adapter is None:
            return self._register(model, None)
        return self._register(self._locate(adapter, key), model)

    def dtype(self, word: str | None, key: str) -> str | None:
        """Return the safetensors name of the dtype under a key."""
        if word is None:
            return None
        try:
            return dtype_of_word(word)
        except UserError as error:
            raise UserError(f"{self.at(key)}: {error}") from None

    def _split(self, reference: Any, at: tuple[Any, ...]) -> tuple[str, str | None]:
        """Return the model and the adapter (None: no adapter) of a reference, each with its revision."""
        if isinstance(reference, str):
            model, plus, adapter = reference.partition("+")
            return (model, adapter) if plus and self._find_folder(reference) is None else (reference, None)
        if isinstance(reference, dict) and "path" in reference:
            reference = {"model": reference}
        if not isinstance(reference, dict) or not isinstance(reference.get("model"), dict | str):
            raise UserError(f"{self.at(*at)}: a model is a folder, or {{model: {{path: FOLDER}}}}")
        lora = reference.get("lora")
        return self._as_text(reference["model"], at), self._as_text(lora, at) if lora is not None else None

    def _as_text(self, part: Any, at: tuple[Any, ...]) -> str:
        """Return a part of a reference, `{path, revision}` or a text, as a text."""
        if not isinstance(part, dict):
            return str(part)
        for setting, value in part.items():
            if setting not in ("path", "revision") and value is not None:
                raise UserError(f"{self.at(*at)}: '{setting}' of a model is not supported; name a folder")
        if not isinstance(part.get("path"), str):
            raise UserError(f"{self.at(*at)}: a model needs a 'path'")
        return str(part["path"]) + (f"@{part['revision']}" if part.get("revision") is not None else "")

    def _locate(self, text: str, at: tuple[Any, ...]) -> _Located:
        if text in self._stages:
            self.used_stages.add(text)
            return _Located(self._stages[text], (text,), None)
        folder = self._find_folder(text)
        if folder is not None:
            is_relative = not Path(text).expanduser().is_absolute()
            folder = folder.resolve()
            return _Located(folder, _names_of(folder), str(Path(text)) if is_relative else None)
        name, revision = split_revision(text)
        cached = cached_model(name, revision)
        if cached is not None:
            owner, _, short = name.rpartition("/")
            names = (short, f"{owner}-{short}", f"{owner}-{short}-{cached.name}")
            return _Located(cached, names, f"{name}@{cached.name}")
        if revision is not None and self._find_folder(name) is not None:
            raise UserError(
                f"{self.at(*at)}: {name} is a folder, which has no revision '{revision}'; remove '@{revision}', or download "
                f"that revision first: {download_command(name, revision)}"
            )
        hint = ""
        if is_hub_name(name):
            hint = (
                " and no such model in the Hugging Face cache; merges download nothing, so download it first: "
                f"{download_command(name, revision)}"
            )
        raise UserError(f"{self.at(*at)}: there is no folder {name}{hint}")

    def _find_folder(self, path: str) -> Path | None:
        return next((folder for folder in (Path(path).expanduser(), self.path.parent / path) if folder.is_dir()), None)

    def _register(self, model: _Located, base: _Located | None) -> str:
        """Return a unique name for a model: the first of its names that no other model has."""
        base_folder = base.folder if base is not None else None
        for name in model.names:
            if name not in self.models:
                self.models[name] = model.folder
                self._note_reference(name, model)
                if base is not None:
                    self.adapter_bases[name] = base.folder
                    self._note_reference(f"base of {name}", base)
            if (self.models[name], self.adapter_bases.get(name)) == (model.folder, base_folder):
                return name
        raise UserError(f"{self.path}: too many models are called '{model.names[0]}'; rename a folder")

    def _note_reference(self, name: str, model: _Located) -> None:
        if model.reference is not None:
            self.references[name] = model.reference

    def at(self, *key: Any) -> str:
        """Return `file:line` of a key, or of its nearest parent in the file."""
        place = key
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path}:{self.lines.get(place, 1)}"


def _names_of(folder: Path) -> tuple[str, ...]:
    """Return the names for a folder's model: the folder's name, with its parent's name as a prefix if it is taken."""
    return (folder.name, f"{folder.parent.name}-{folder.name}", str(folder).replace("/", "-"))
