"""torch.compile is an option that changes speed, not results."""

from __future__ import annotations

import shutil

import pytest

from expertctl.workspace import Workspace


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_a_compiled_run_ends_near_the_plain_one(project: Workspace) -> None:
    project.branch("plain", domain="prose")
    project.branch("compiled", domain="prose", training={"compile": True})
    result = project.train("plain", "compiled")
    assert not result.failed
    table = project.evaluate("plain", "compiled", domains=["prose"])
    plain, compiled = (table.scores[name]["prose"].values["bits_per_byte"] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, abs=1e-3)
