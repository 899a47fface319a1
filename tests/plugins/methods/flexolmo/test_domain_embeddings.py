"""Router rows that begin with the sentence embeddings of another model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from flexolmo_workspaces import make_flexolmo_workspace
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from expertctl import UserError, load_model
from expertctl.core.testing import tiny_model_folder
from expertctl.plugins.methods.flexolmo.domain_embeddings import (
    DomainEmbedding,
    input_moments,
    sentence_embedding,
)

OWN, PUBLIC = ["the law of the sea", "the law of contracts"], ["a walk in the park", "a day on the beach"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small BERT with a tokenizer."""
    root = tmp_path_factory.mktemp("embedder")
    made = tiny_model_folder(root / "llama", "llama")
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=512,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(root / "bert")
    for file in made.glob("tokenizer*"):
        shutil.copy(file, root / "bert" / file.name)
    return root / "bert"


def embedded(folder: Path, embedder: Path, seed: int = 0) -> tuple[DomainEmbedding, object, list]:
    model, tokenizer = load_model(folder)
    own, public = ([tokenizer(text, return_tensors="np")["input_ids"][0] for text in part] for part in (OWN, PUBLIC))
    return sentence_embedding(model, embedder, own, public, (OWN, PUBLIC), seed), model, [*own, *public]


def test_rows_are_the_projected_difference_scaled_in_every_layer(tmp_path: Path, embedder: Path) -> None:
    embedding, model, blocks = embedded(tiny_model_folder(tmp_path / "seed", "olmo2"), embedder)
    other, tokenizer = AutoModel.from_pretrained(embedder).eval(), AutoTokenizer.from_pretrained(embedder)

    def mean(texts: list[str]) -> torch.Tensor:
        with torch.inference_mode():
            states = [other(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
        vector = torch.stack(states).mean(0).double()
        return vector / vector.norm()

    width = embedding.rows.shape[1]
    projection = torch.randn(width, 24, generator=torch.Generator().manual_seed(0)).double() / 24**0.5
    direction = projection @ (mean(OWN) - mean(PUBLIC))
    for row in embedding.rows.double():
        assert torch.nn.functional.cosine_similarity(row, direction, dim=0) > 1 - 1e-6
    squares = input_moments(model, blocks)
    assert squares.mean.shape == embedding.rows.shape
    gathered: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda _, given: gathered.append(given[0][0]))
    with torch.inference_mode():
        for block in blocks:
            model(input_ids=torch.from_numpy(block[None]))
    handle.remove()
    logits = torch.cat(gathered) @ embedding.rows[1]
    assert float(logits.square().mean().sqrt()) == pytest.approx(1, abs=1e-4)


def test_the_projection_depends_on_the_seed_alone(tmp_path: Path, embedder: Path) -> None:
    folder = tiny_model_folder(tmp_path / "seed", "olmo2")
    rows = [embedded(folder, embedder, seed)[0].rows for seed in (0, 0, 1)]
    assert rows[0].equal(rows[1])
    assert not rows[0].allclose(rows[2])


def test_experts_train_and_merge_from_such_rows(tmp_path: Path, embedder: Path) -> None:
    options = {"public": "public", "samples": 4, "embedding": str(embedder)}
    made = make_flexolmo_workspace(tmp_path / "ws", owners=("prose", "chance"), options=options)
    made.merge("flex", method="flexolmo")
    model, tokenizer = load_model(made.generalists / "flex")
    assert type(model).__name__ == "FlexOlmoForCausalLM"
    row = model.model.layers[0].mlp.gate.weight[1]
    assert float(row.detach().norm()) > 0
    assert torch.isfinite(model(**tokenizer("import this", return_tensors="pt")).logits).all()


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is not a sentence-embedding model: it has no config\.json"):
        embedded(tiny_model_folder(tmp_path / "seed", "olmo2"), tmp_path / "empty")
