"""Tokenizers and models with embeddings that fit them, for tests of merges with different vocabularies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from toy_models import random_tensors, write_model

from expertctl.core.artefacts.files import read_json
from expertctl.merge.sources.vocabularies.model_vocabulary import ModelVocabulary

TEXT = ("the law of the land", "a code of honour", "to be or not to be")


def tokenizer(folder: Path, added: Sequence[str] = (), text: Sequence[str] = TEXT, size: int = 60) -> Path:
    """Write a BPE tokenizer that is trained on `text`, with further tokens, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False))
    made.add_tokens([AddedToken(token) for token in added])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def num_tokens(folder: Path) -> int:
    """Return the number of tokens that a tokenizer declares."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def vocabulary(folder: Path, rows: int = 0) -> ModelVocabulary:
    """Return the vocabulary of a model with `rows` embedding rows; by default one for each token."""
    return ModelVocabulary(folder.name, folder, rows or num_tokens(folder))


def model(folder: Path, seed: int, added: Sequence[str] = (), rows: int = 0) -> Path:
    """Write a model with a tokenizer; it has `rows` embedding rows, by default one for each token."""
    tokenizer(folder, added)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    count = rows or num_tokens(folder)
    torch.manual_seed(seed)
    base = random_tensors(0, rows=200)
    values = {name: tensor + 0.05 * torch.randn(tensor.shape) for name, tensor in base.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        values[name] = values[name][:count]
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    write_model(folder, values)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    return folder


def tokens_of(folder: Path) -> dict[str, int]:
    """Return the tokens of a written tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


def update(path: Path, **settings: object) -> None:
    """Change settings in a JSON file, which need not exist."""
    content = read_json(path) if path.is_file() else {}
    path.write_text(json.dumps(content | settings))
