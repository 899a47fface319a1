"""The loss on public text that bounds a delivery."""

from __future__ import annotations

import json
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_members import private_text
from inline_launching import ask_inline
from safetensors.torch import load_file, save_file

from expertctl import UserError, load_model
from expertctl.core.artefacts.files import read_json
from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.project import load_project
from expertctl.experts.federation.judging import held_out
from expertctl.experts.federation.judging import judges as judging
from expertctl.experts.federation.judging.acceptance import HeldOut
from expertctl.experts.federation.judging.held_out import loss_on
from expertctl.experts.federation.judging.judges import Judges


@pytest.fixture
def layout(tmp_path: Path, new_workspace: Any) -> Layout:
    root: Path = new_workspace(tmp_path / "hub", experts=())
    private_text(tmp_path / "public.jsonl", json)
    (root / "expertctl.yaml").write_text(
        "domains: {public: {path: ../public.jsonl}}\ntraining: {sequence_length: 16}\n"
    )
    return Layout(root)


def model_beside(layout: Layout, scale: float) -> Path:
    """Return the seed as a plain model whose head is scaled."""
    folder = layout.root.parent / f"scaled-{scale}"
    folder.mkdir()
    for path in layout.seed.iterdir():
        if path.is_file() and path.name not in ("seed.json", "run.json", "model.safetensors"):
            shutil.copy(path, folder)
    weights = load_file(layout.seed / "model.safetensors")
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    weights[name] = weights[name] * scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_expert_is_measured_against_its_seed_whose_loss_is_cached(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judges, "_ask", ask_inline)
    measure = Judges(layout)
    same = measure(layout.seed, model_beside(layout, 1.0))
    assert same is not None
    assert same.seed == same.expert
    kept = layout.root / "federation" / "held-out.json"
    content = read_json(kept)
    assert content["loss"] == same.seed
    kept.write_text(json.dumps({**content, "loss": 1.5}))
    worse = measure(layout.seed, model_beside(layout, 50.0))
    assert worse is not None
    assert worse.seed == 1.5  # as it was kept
    assert worse.expert > same.expert
    kept.write_text(json.dumps({**content, "of": "other text", "loss": 1.5}))
    assert measure(layout.seed, layout.root.parent / "scaled-1.0") == same


def test_the_loss_is_the_mean_over_evenly_spaced_blocks(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    text = held_out._public_text(layout, load_project(layout.config_file), layout.seed)
    (blocks,) = text.values()
    assert len(blocks) > 4
    model, _ = load_model(layout.seed, dtype="float32")

    def naive(places: list[int]) -> float:
        losses = []
        for place in places:
            tokens = torch.from_numpy(blocks.block(place))[None]
            logits = model(tokens[:, :-1]).logits.double().log_softmax(-1)
            losses.append(-logits.gather(-1, tokens[:, 1:, None]).mean().item())
        return sum(losses) / len(losses)

    with torch.no_grad():
        assert math.isclose(loss_on(layout.seed, text), naive(list(range(len(blocks)))), rel_tol=1e-5)
        monkeypatch.setattr(held_out, "BLOCKS", 2)
        assert math.isclose(loss_on(layout.seed, text), naive([0, len(blocks) - 1]), rel_tol=1e-5)


def test_an_expert_that_cannot_be_scored_is_refused_and_a_seed_is_an_error(layout: Layout) -> None:
    """Measured in a process of its own, which goes on after each."""
    judges = Judges(layout, 1)
    broken = model_beside(layout, 2.0)
    (broken / "config.json").write_text("{}")
    measured = judges(layout.seed, broken)
    assert measured is not None
    assert math.isnan(measured.expert)
    assert measured.seed > 0
    judge = judges._free.queue[-1]
    (layout.root / "federation" / "held-out.json").unlink()
    seed_weights = (layout.seed / "model.safetensors").read_bytes()
    (layout.seed / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="public text cannot be scored, so no delivery can be judged: "):
        judges(layout.seed, broken)
    assert judges._free.queue[-1] is judge
    (layout.seed / "model.safetensors").write_bytes(seed_weights)
    judge._process.kill()  # the next delivery starts another process
    again = judges(layout.seed, model_beside(layout, 1.0))
    assert again is not None
    assert again.seed == again.expert
    other = judges._free.queue[-1]
    assert other is not judge
    other._end_if_idle()
    assert other._process.poll() is not None
    assert judges(layout.seed, layout.root.parent / "scaled-1.0") == again


def test_as_many_deliveries_are_scored_at_a_time_as_there_are_judges(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3, timeout=60)

    class Waiting:
        def __init__(self, root: Path, threads: int) -> None: ...

        def answer(self, seed: Path, folder: Path) -> dict[str, float]:
            together.wait()
            return {"seed": 1.0, "expert": 2.0}

    monkeypatch.setattr(judging, "_Judge", Waiting)
    judges = Judges(layout, 3)
    with ThreadPoolExecutor(9) as pool:
        losses = list(pool.map(lambda _: judges(layout.seed, layout.seed), range(9)))
    assert losses == [HeldOut(1.0, 2.0)] * 9
