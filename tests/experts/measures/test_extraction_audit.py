"""The extraction attack: it catches a model that remembers, and lets one go that has not seen the text."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reporters import Recorder
from scipy.stats import norm

from expertctl import UserError
from expertctl.core.testing import tiny_model_folder
from expertctl.core.text.tokenizer import TextEncoder
from expertctl.experts.measures.extraction_audit import (
    AttackSettings,
    Extraction,
    Target,
    attack,
    audit_extraction,
    choose_targets,
    similarity,
)

SMALL = AttackSettings(prefix=8, continuation=24, samples=4, documents=6, batch_size=8)


def documents(count: int, seed: int = 0) -> list[str]:
    """Return documents of random letters: nobody can guess how they go on."""
    source = random.Random(seed)
    return ["".join(source.choices(string.ascii_lowercase, k=60)) for _ in range(count)]


def memorise(folder: Path, texts: list[str], steps: int = 300) -> float:
    """Train a model until it knows some documents by heart; return its last loss."""
    from transformers import AutoModelForCausalLM

    encoder = TextEncoder.of_folder(folder)
    rows = [[encoder.separator, *ids[:40]] for ids in encoder.encode(texts)]
    tokens = torch.tensor(rows)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-2)
    loss = torch.zeros(())
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-2 * (1 - step / steps)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    return float(loss.detach())


@pytest.fixture(scope="module")
def remembering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained on `documents(5)` until it knows them."""
    folder = tiny_model_folder(tmp_path_factory.mktemp("audit") / "remembering", "llama")
    assert memorise(folder, documents(5)) < 0.2
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("audit") / "fresh", "llama")


def test_a_model_that_remembers_is_caught_and_a_fresh_one_is_not(remembering: Path, fresh: Path) -> None:
    recorder = Recorder()
    audit = audit_extraction(
        remembering,
        documents(5),
        SMALL,
        reference=fresh,
        reporter=recorder,
    )
    assert audit.model.hits == 5
    assert audit.model.interval[0] > 0.5
    assert audit.reference is not None
    assert audit.reference.hits == 0
    assert audit.reference.interval[1] < 0.5
    assert audit.only_model == 5
    assert ("remembering", 5, 5) in recorder.steps
    assert ("fresh", 2, 5) in recorder.steps, "two documents of four samples each at a time"


def test_text_that_it_has_not_seen_is_not_found_in_it(remembering: Path) -> None:
    audit = audit_extraction(remembering, documents(5, seed=1), SMALL)
    assert audit.model.hits == 0
    assert audit.reference is None
    assert audit.only_model == 0


def test_nothing_of_the_text_is_reported(remembering: Path) -> None:
    texts = documents(5)
    report = json.dumps(audit_extraction(remembering, texts, SMALL).as_json())
    assert not any(text[start : start + 6] in report for text in texts for start in range(len(text) - 6))


def test_the_same_seed_gives_the_same_figures(fresh: Path) -> None:
    first, again = (audit_extraction(fresh, documents(3), SMALL).as_json() for _ in range(2))
    assert first == again
    other = audit_extraction(fresh, documents(3), AttackSettings(**{**vars(SMALL), "seed": 1})).as_json()
    assert first["mean_similarity"] != other["mean_similarity"]


def test_one_good_sample_of_many_is_enough() -> None:
    """A model that tells the truth half of the time is caught in all documents; the best sample counts."""

    class Sometimes(torch.nn.Module):
        device = "cpu"

        def generate(self, prompts: torch.Tensor, **how: int) -> torch.Tensor:
            rows = []
            for row in prompts.tolist():
                for number in range(how["num_return_sequences"]):
                    truth = [row[-1] + 1 + step for step in range(how["max_new_tokens"])]
                    rows.append(row + (truth if number == 3 else [0] * how["max_new_tokens"]))
            return torch.tensor(rows)

    targets = [
        Target(tuple(range(10, 18)), tuple(range(18, 42))),
        Target(tuple(range(50, 58)), tuple(range(90, 114))),
    ]
    assert attack(Sometimes(), targets, 0, SMALL) == (1.0, 0.0)  # type: ignore[arg-type]  # all that it needs


def naive_distance(first: list[int], other: list[int]) -> int:
    """Wagner and Fischer's table."""
    before = list(range(len(other) + 1))
    for row, left in enumerate(first, start=1):
        now = [row]
        for column, right in enumerate(other, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (left != right)))
        before = now
    return before[-1]


IDS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(IDS, IDS)
def test_similarity_is_one_less_the_distance_over_the_longer(first: list[int], other: list[int]) -> None:
    expected = 1 - naive_distance(first, other) / max(len(first), len(other))
    assert similarity(first, other) == pytest.approx(expected)


def test_a_sample_that_ends_early_is_compared_as_it_is() -> None:
    assert similarity([], (1, 2, 3)) == 0.0
    assert similarity([1, 2], (1, 2, 3, 4)) == 0.5


@pytest.mark.parametrize(("hits", "documents"), [(0, 50), (3, 50), (50, 50), (7, 10_000)])
def test_the_interval_is_wilsons(hits: int, documents: int) -> None:
    extraction = Extraction("any", (1.0,) * hits + (0.0,) * (documents - hits), 0.9)
    z, share = float(norm.ppf(0.975)), hits / documents
    middle = (share + z**2 / (2 * documents)) / (1 + z**2 / documents)
    half = z / (1 + z**2 / documents) * (share * (1 - share) / documents + z**2 / (4 * documents**2)) ** 0.5
    assert extraction.interval == pytest.approx((max(middle - half, 0), min(middle + half, 1)), abs=1e-9)
    assert extraction.rate == share


def test_documents_are_chosen_evenly_and_short_ones_are_counted(fresh: Path) -> None:
    encoder = TextEncoder.of_folder(fresh)
    texts = documents(40) + ["short"] * 3
    needed = SMALL.prefix + SMALL.continuation
    long_enough = sum(len(ids) >= needed for ids in encoder.encode(texts))
    picked: dict[tuple[int, ...], int] = {}
    for seed in range(200):
        settings = AttackSettings(**{**vars(SMALL), "seed": seed, "documents": 10})
        targets = choose_targets(texts, encoder, settings)
        assert (targets.long_enough, targets.too_short) == (long_enough, len(texts) - long_enough)
        assert len(set(targets.chosen)) == 10
        for target in targets.chosen:
            picked[target.prefix] = picked.get(target.prefix, 0) + 1
    expected = 200 * 10 / long_enough
    assert len(picked) == long_enough
    assert all(expected / 2 < count < expected * 2 for count in picked.values())


def test_impossible_audits_are_one_clear_error(fresh: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no document has 32 tokens \(1 are shorter\); lower --prefix"):
        audit_extraction(fresh, ["short"], SMALL)
    with pytest.raises(UserError, match=r"fresh has 128 positions, .* need 289; lower --continuation"):
        audit_extraction(fresh, documents(2), AttackSettings())
    other = tiny_model_folder(tmp_path / "other", "llama")
    tokenizer = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"padding_side": "left"}))
    with pytest.raises(UserError, match="fresh and other have different tokenizers"):
        audit_extraction(fresh, documents(2), SMALL, reference=other)
