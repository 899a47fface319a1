"""A merge reads each artefact once and plans each tensor once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import expertctl
from expertctl.core.artefacts import safetensors_io
from expertctl.merge.planning import plan as plan_module
from expertctl.merge.sources import models as models_module


@pytest.mark.parametrize(
    ("method", "options", "plans"),
    [
        ("average", {}, 1),
        ("mixture", {"router": "random"}, 1),
        (
            "mixture",
            {"router": "prompts", "positive_prompts": {"code": ["def"], "law": ["court"]}},
            2,
        ),  # once more with the fitted router
        ("ensemble", {"prior": "uniform"}, 0),
    ],
    ids=["average", "mixture", "fitted mixture", "ensemble"],
)
def test_a_merge_reads_each_manifest_once_and_is_planned_once(
    tmp_path: Path, new_workspace: Any, monkeypatch: pytest.MonkeyPatch, method: str, options: Any, plans: int
) -> None:
    workspace = new_workspace(tmp_path / "ws", ("code", "law"), changed="model.layers.*.mlp.*")
    counts: Counter[str] = Counter()

    def count(module: Any, function: str, name: Any) -> None:
        original = getattr(module, function)

        def counted(*arguments: Any) -> Any:
            counts[name(*arguments)] += 1
            return original(*arguments)

        monkeypatch.setattr(module, function, counted)

    count(models_module, "read_manifest", lambda folder: f"manifest of {folder.name}")
    count(plan_module, "plan_tensors", lambda *_: "plans")
    count(safetensors_io, "read_header", lambda path: f"header of {path.parent.name}")
    texts: list[int] = []
    read_text = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, **how: (texts.append(1) if self.name == "expert.json" else None, read_text(self, **how))[1],
    )
    expertctl.Workspace(workspace).merge("m", method=method, options=options)
    assert counts["manifest of law"] == counts["manifest of seed"] == counts["header of law"] == 1
    assert counts["plans"] == plans
    assert len(texts) == 2 * 2  # each of the two is parsed once, and once more for its checksum
