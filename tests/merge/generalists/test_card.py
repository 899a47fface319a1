"""Model cards: valid hub metadata and the contents of the manifest."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.statements import PrivacyStatement
from expertctl.core.manifests.verification import verify
from expertctl.merge.generalists.card import model_card
from expertctl.workspace import Workspace


@pytest.fixture
def folder(workspace: Path) -> Path:
    Workspace(workspace).merge(
        "soup", method="ties", weights={"code": 2, "law": 1, "news": 1}, options={"density": 0.5}
    )
    return workspace / "generalists" / "soup"


def test_a_merge_writes_a_card_that_the_hub_understands(folder: Path) -> None:
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.license == "cc0-1.0"
    assert card.data.base_model == ["seed", "code", "law", "news"]
    assert card.data.tags == ["expertctl", "generalist", "merge", "ties"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert verify(folder) == []


def test_the_recipe_in_the_card_can_be_pasted_and_gives_the_same_model(folder: Path, workspace: Path) -> None:
    text = (folder / "README.md").read_text()
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    again = Workspace(workspace).merge("again", **recipe["merges"]["soup"])
    assert again.tensors == read_manifest(folder).tensors


def test_owners_licences_data_and_scores_are_told(folder: Path, workspace: Path) -> None:
    scores = {
        "domains": ["law"],
        "models": {"soup": {"bits_per_byte": {"law": 1.23456}, "perplexity": {"law": 3.0}, "tokens": {"law": 9}}},
    }
    text = model_card(read_manifest(folder), scores)
    assert "| law | expert | 1 | not known | CC0-1.0 | law (10 tokens) |" in text
    assert "| soup | 1.235 |" in text
    assert str(workspace) not in text
    assert text == model_card(read_manifest(folder), scores)


def test_the_scores_of_other_evaluators_are_shown_by_the_name_of_their_metric(folder: Path) -> None:
    """Whether higher is better is not known here, so that nothing is said of it."""
    models = {"soup": {"accuracy": {"law": 0.5}, "tokens": {"law": 9}, "text": {"law": {"part": "test"}}}}
    text = model_card(read_manifest(folder), {"domains": ["law"], "models": models})
    assert "## Evaluation\n\n`accuracy`.\n\n| model | law |" in text
    assert "| soup | 0.500 |" in text
    assert "lower is better" not in text


def test_experts_and_seeds_have_cards_too(workspace: Path) -> None:
    expert = ModelCard(model_card(read_manifest(workspace / "experts" / "law")))
    assert expert.data.to_dict()["base_model_relation"] == "finetune"
    assert "expertctl.load_model" in expert.text
    seed = ModelCard(model_card(read_manifest(workspace / "seed")))
    assert "base_model" not in seed.data.to_dict()
    assert "AutoModelForCausalLM" in seed.text


def test_the_card_says_what_protects_private_text(workspace: Path) -> None:
    from dataclasses import replace

    law = read_manifest(workspace / "experts" / "law")
    spent = PrivacyStatement(
        "one block of 32 tokens, added or removed",
        7.991,
        1e-6,
        "rdp",
        "secret",
        1.0,
        1.0,
        0.1,
        5,
        (),
        "1.6.0",
    )
    text = model_card(replace(law, data=replace(law.data, privacy=spent)))
    assert (
        "law (10 tokens); differential privacy: epsilon 7.99 at delta 1e-06 for one block of 32 tokens, added or removed"
        in text
    )
    seeded = model_card(replace(law, data=replace(law.data, privacy=replace(spent, epsilon=None))))
    assert "differential privacy" not in seeded
