"""`expertctl export` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_export_prints_what_it_wrote(run: Any, workspace: Path, tmp_path: Path) -> None:
    result = run("export", "code", "--to", "dense", "-o", tmp_path / "out", "--option", "shard_size=20KB", "--json")
    assert result.status == 0
    assert result.json.keys() == {"name", "exporter", "output", "files", "notes"}
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert result.json["files"] == files
    assert "model.safetensors.index.json" in files
    assert result.json["notes"][0] in result.err
    result = run("export", "code", "--to", "dense", "-o", tmp_path / "out", "--force")
    assert result.out.startswith(f"code is in {tmp_path / 'out'}: 6 files, ")
    assert run("export", "code", "--to", "dense", "-o", tmp_path / "out").error.endswith("or choose another name")


def test_export_names_the_exporters_and_refuses_an_ensemble(run: Any, workspace: Path, tmp_path: Path) -> None:
    assert run("export", "code", "--to", "onnx", "-o", tmp_path / "out").error == (
        "no exporter 'onnx'; installed: dense, gguf, safetensors"
    )
    assert "distil" in run("export", "forest", "--to", "gguf", "-o", tmp_path / "out").error
    offers = [offer["name"] for plugin in run("plugins", "--json").json["plugins"] for offer in plugin["offers"]]
    assert {"dense", "gguf", "safetensors"} <= set(offers)
    assert not (tmp_path / "out").exists()


def test_an_output_in_a_folder_without_permission_is_one_line(run: Any, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("export", "code", "--to", "dense", "-o", tmp_path / "file" / "out")
    assert result.status == 1
    assert str(tmp_path / "file") in result.error
