"""Text embeddings by mean pooling of a model's last hidden states. Shapes: N = texts, T = tokens, d = width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.artefacts.files import read_json
from ...core.errors import UserError

BATCH = 16
"""Texts per forward pass; texts are batched by length."""


class SentenceEmbedder:
    """A sentence-embedding model from a local folder."""

    def __init__(self, folder: Path) -> None:
        """Load the model; raises `UserError` if the folder has no config.json, or asks for other pooling."""
        from transformers import AutoModel, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a sentence-embedding model: it has no config.json")
        pooling = folder / "1_Pooling" / "config.json"  # of sentence-transformers
        if pooling.is_file() and not read_json(pooling).get("pooling_mode_mean_tokens", True):
            raise UserError(f"{pooling}: embeddings are means over tokens here; use a model with mean pooling")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the embeddings of texts, (N, d)."""
        ids = [self._tokenizer(text, truncation=True)["input_ids"] for text in texts]
        return mean_states(lambda **inputs: self._model(**inputs).last_hidden_state, ids, self._model.device)

    def mean(self, texts: Sequence[str]) -> Tensor:
        """Return the mean embedding of texts, (d,)."""
        return torch.from_numpy(self(texts)).mean(dim=0)


class HiddenStateEmbedder:
    """Text embeddings from a language model's last hidden states."""

    def __init__(self, folder: Path, tokens: int) -> None:
        """Load the model; only the first `tokens` tokens of each text are used."""
        from ...core.models.loading import load_network, max_positions
        from ...core.text.tokenizer import TextEncoder

        self._encoder = TextEncoder.of_folder(folder)
        self._model = load_network(folder, dtype="float32")
        self._tokens = min(tokens, max_positions(folder))

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the mean hidden states of texts, (N, d); an empty text is embedded as the separator token."""
        ids = [row[: self._tokens] or [self._encoder.separator] for row in self._encoder.encode(texts)]
        backbone = self._model.base_model
        return mean_states(
            lambda **inputs: backbone(**inputs, use_cache=False).last_hidden_state, ids, self._model.device
        )


def mean_states(
    states: Callable[..., Tensor], ids: Sequence[Sequence[int]], device: Any = "cpu"
) -> NDArray[np.float32]:
    """Return the mean of `states(input_ids, attention_mask)` over each text's tokens, without padding, (N, d)."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    means: dict[int, Tensor] = {}
    with torch.inference_mode():
        for begin in range(0, len(order), BATCH):
            rows = order[begin : begin + BATCH]
            longest = max(len(ids[row]) for row in rows)
            ids_NT = torch.zeros(len(rows), longest, dtype=torch.long)
            mask_NT = torch.zeros(len(rows), longest, dtype=torch.long)
            for position, row in enumerate(rows):
                ids_NT[position, : len(ids[row])] = torch.tensor(ids[row])
                mask_NT[position, : len(ids[row])] = 1
            states_NTd = states(input_ids=ids_NT.to(device), attention_mask=mask_NT.to(device)).float().cpu()
            weights_NT1 = mask_NT[..., None] / mask_NT.sum(dim=1)[:, None, None]
            means_Nd = (states_NTd * weights_NT1).sum(dim=1)
            means |= dict(zip(rows, means_Nd, strict=True))
    stacked: NDArray[np.float32] = torch.stack([means[row] for row in range(len(ids))]).numpy()
    return stacked
