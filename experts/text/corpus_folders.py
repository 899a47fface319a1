"""The files of a corpus folder: formats by suffix, splits by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.text import CorpusFormat

_SPLIT = re.compile(
    r"(?P<split>train|training|valid|validation|val|dev|test)([-_.]?(part|shard)?[-_.]?\d[-_.\dof]*)?(\.[a-z]\w*)*",
    re.IGNORECASE,
)
"""`train.jsonl`, `train-00000-of-00002.parquet`, `valid_3.txt.gz`, and folders `dev`; not `train_station.txt`."""
_SPLITS = {"training": "train", "validation": "valid", "val": "valid", "dev": "valid"}
_TERMS = re.compile(r"(licen[cs]e|notice|copying)\b.*", re.IGNORECASE)
_ABOUT_THE_CORPUS = re.compile(r"(readme|changelog|citation|authors)\b.*", re.IGNORECASE)


@dataclass(frozen=True)
class CorpusFolder:
    """The files of a folder by their use."""

    documents: tuple[Path, ...]
    """Files to divide by document; empty if their names give the splits."""
    train: tuple[Path, ...] = ()
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()
    """Licences, text about the corpus, files beside named splits, and those of unknown formats."""

    def description(self, folder: Path) -> str:
        """Return one line that says which files are used for what."""
        parts = {"documents": self.documents, "train": self.train, "valid": self.valid, "test": self.test}
        parts["left out"] = self.left_out
        return f"{folder}: " + "; ".join(f"{use}: {_names(files, folder)}" for use, files in parts.items() if files)


def read_corpus_folder(folder: Path, format_name: str | None = None) -> CorpusFolder:
    """Return the use of each file below a folder; raises `UserError` if there is none of a known format, or of the named one.

    Names such as `train.jsonl`, `validation-00000-of-00001.parquet` or `data/dev/part1.txt` give the splits if there
    is training and validation text; otherwise, all files are divided by document, without a test split beside training
    text.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file, folder))
    readable = [file for file in files if format_of(file, format_name) and not _is_about_the_corpus(file, folder)]
    if not readable:
        known = ", ".join(sorted(_formats(format_name)))
        raise UserError(f"{folder} has no file of a known format; known suffixes: {known}")
    splits = {file: _split_of(file, folder) for file in readable}
    if {"train", "valid"} <= set(splits.values()):
        train, valid, test = (
            tuple(file for file in readable if splits[file] == name) for name in ("train", "valid", "test")
        )
        return CorpusFolder((), train, valid, test, _others(files, (*train, *valid, *test)))
    has_splits = bool({"train", "valid"} & set(splits.values()))
    documents = tuple(file for file in readable if not (has_splits and splits[file] == "test"))
    return CorpusFolder(documents, left_out=_others(files, documents))


def format_of(file: Path, format_name: str | None = None) -> CorpusFormat | None:
    """Return the format of a file by its suffix, among all formats of text or the named one; None if it is unknown."""
    formats = _formats(format_name)
    matching = [suffix for suffix in formats if file.name.lower().endswith(suffix)]
    return formats[max(matching, key=len)] if matching else None


def require_format(file: Path, format_name: str | None = None) -> CorpusFormat:
    """Return the format of a file; raises `UserError` that lists the known suffixes, or the known formats."""
    corpus_format = format_of(file, format_name)
    if corpus_format is None:
        known = ", ".join(sorted(_formats(format_name)))
        raise UserError(f"{file} has an unknown format; known suffixes: {known}")
    return corpus_format


def _formats(name: str | None) -> Mapping[str, CorpusFormat]:
    """Return the formats of text, or the named one, by the suffixes of their files."""
    plugins = installed_plugins()
    chosen = [plugins.offer(CorpusFormat, name)] if name is not None else plugins.offers(CorpusFormat).values()
    return {
        suffix: corpus_format
        for corpus_format in chosen
        for suffix in corpus_format.suffixes
        if name is not None or corpus_format.holds == "text"
    }


def _split_of(file: Path, folder: Path) -> str | None:
    """Return the split that a file's name, or else a folder's above it, stands for."""
    for name in reversed(file.relative_to(folder).parts):
        if match := _SPLIT.fullmatch(name):
            split = match["split"].lower()
            return _SPLITS.get(split, split)
    return None


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _is_about_the_corpus(file: Path, folder: Path) -> bool:
    """Return whether a file is a licence, or at the top of the folder and describes it."""
    return bool(_TERMS.fullmatch(file.name) or (file.parent == folder and _ABOUT_THE_CORPUS.fullmatch(file.name)))


def _others(files: Sequence[Path], used: Sequence[Path]) -> tuple[Path, ...]:
    left = set(files) - set(used)
    return tuple(file for file in files if file in left)


def _names(files: Sequence[Path], folder: Path, most: int = 5) -> str:
    names = [str(file.relative_to(folder)) for file in files[:most]]
    return ", ".join(names) + (f" and {len(files) - most} more" if len(files) > most else "")
