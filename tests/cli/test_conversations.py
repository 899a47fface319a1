"""What commands say about conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conversations import make_chat_project


def test_the_listing_shows_a_conversation_with_what_counts(run: Any, tmp_path: Path) -> None:
    make_chat_project(tmp_path, {"counts": "last"})
    assert run("data", "prepare", cwd=tmp_path).status == 0
    listed = run("data", "list").out
    assert "<|im_start|>assistant\n  ⟦yes<|im_end|>\n  ⟧" in listed
    assert listed.count("⟦") == 2  # once in the legend
    talks = run("--json", "data", "list").json["domains"]["talks"]
    assert [piece["text"] for piece in talks["example"] if piece["counts"]] == ["yes<|im_end|>\n"]
    assert talks["prepared"]["train"]["counted_tokens"] > 0
