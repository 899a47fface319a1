"""Files of a corpus folder: splits by name, and text about the corpus left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reporters import Recorder

from expertctl.core.errors import UserError
from expertctl.experts.text.corpus_folders import read_corpus_folder
from expertctl.workspace import Workspace


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(5)))
    return root


def uses(root: Path) -> dict[str, list[str]]:
    folder = read_corpus_folder(root)
    parts = {"documents": folder.documents, "train": folder.train, "valid": folder.valid, "test": folder.test}
    parts["left out"] = folder.left_out
    return {use: [str(file.relative_to(root)) for file in files] for use, files in parts.items() if files}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ("train.jsonl", "valid.jsonl", "LICENSE.txt"),
            {"train": ["train.jsonl"], "valid": ["valid.jsonl"], "left out": ["LICENSE.txt"]},
        ),
        (
            ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/validation.jsonl"),
            {
                "train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
                "valid": ["data/validation.jsonl"],
            },
        ),
        (
            ("train/a.txt", "dev/b.txt", "test/c.txt"),
            {"train": ["train/a.txt"], "valid": ["dev/b.txt"], "test": ["test/c.txt"]},
        ),
        (("train.jsonl", "test.jsonl"), {"documents": ["train.jsonl"], "left out": ["test.jsonl"]}),
        (
            ("a.txt", "dev_notes.txt", "test.txt", "train_station.txt"),
            {"documents": ["a.txt", "dev_notes.txt", "test.txt", "train_station.txt"]},
        ),
        (("a.txt", "README.md", "b.bin", ".git/c.txt"), {"documents": ["a.txt"], "left out": ["README.md", "b.bin"]}),
        (
            ("a/README.md", "b/README.md", "b/LICENSE"),
            {"documents": ["a/README.md", "b/README.md"], "left out": ["b/LICENSE"]},
        ),
        (("licensed.txt", "readme_again.txt"), {"documents": ["licensed.txt", "readme_again.txt"]}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else "",
)
def test_names_give_the_use(names: tuple[str, ...], expected: dict[str, list[str]], tmp_path: Path) -> None:
    assert uses(folder_of(tmp_path, *names)) == expected


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no file of a known format"):
        read_corpus_folder(folder_of(tmp_path, "LICENSE.txt", "model.bin"))


def test_splits_of_a_folder_are_prepared_and_reported(tmp_path: Path, new_workspace: object) -> None:
    text = folder_of(tmp_path / "text", "train.jsonl", "valid.jsonl", "LICENSE.txt")
    config = json.dumps({"domains": {"law": {"path": str(text)}}})
    workspace = Workspace(new_workspace(tmp_path / "workspace", [], config=config))  # type: ignore[operator]
    said = Recorder()
    (prepared,) = workspace.prepare(["law"], reporter=said)
    assert prepared.test is not None
    assert (prepared.train.documents, prepared.valid.documents + prepared.test.documents) == (5, 5)
    assert f"{text}: train: train.jsonl; valid: valid.jsonl; left out: LICENSE.txt" in said.lines
