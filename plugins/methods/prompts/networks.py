"""Prompts in training, as modules that map indices (B, P) to rows (B, P, D).

Shapes: B = batch, P = rows of the prompt, D = width of the embedding, H = bottleneck.
"""

from __future__ import annotations

import torch
from peft import PromptEmbedding, PromptTuningConfig
from torch import Tensor, nn

from .options import Initialisation, Place


def new_rows(tokens: int, initialisation: Initialisation, embedding: nn.Module) -> PromptEmbedding:
    """Return a prompt of PEFT, drawn from torch's generator: rows of the vocabulary, or normally distributed numbers."""
    width = int(embedding.weight.shape[1])  # type: ignore[index]  # an embedding
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        num_transformer_submodules=1,
        token_dim=width,
        prompt_tuning_init="SAMPLE_VOCAB" if initialisation == "vocabulary" else "RANDOM",
    )
    return PromptEmbedding(config, embedding)  # type: ignore[no-untyped-call]  # not annotated in PEFT


class Prompt(nn.Module):
    """A prompt whose rows are trained as they are (prompt tuning, arXiv:2104.08691)."""

    def __init__(self, rows: nn.Module, tokens: int) -> None:
        super().__init__()
        self.rows, self.num_embeddings = rows, tokens

    def forward(self, indices_BP: Tensor) -> Tensor:
        rows_BPD: Tensor = self.rows(indices_BP)
        return rows_BPD


class ResidualPrompt(Prompt):
    """Rows P + MLP(P) of an MLP with a bottleneck (Residual Prompt Tuning, arXiv:2305.03937, section 3).

    Every layer of the MLP has weights of its own; the released code's two-layer MLP runs through the same ones twice.
    """

    def __init__(
        self, rows: nn.Module, tokens: int, width: int, bottleneck: int, layers: int, *, layer_norm: bool
    ) -> None:
        super().__init__(rows, tokens)
        modules: list[nn.Module] = []
        for _ in range(layers):
            modules += [nn.Linear(width, bottleneck), nn.ReLU(), nn.Linear(bottleneck, width)]
            modules += [nn.LayerNorm(width)] if layer_norm else []
        self.network = nn.Sequential(*modules)

    def forward(self, indices_BP: Tensor) -> Tensor:
        rows_BPD = super().forward(indices_BP)
        added_BPD: Tensor = self.network(rows_BPD)
        return rows_BPD + added_BPD


class ProgressivePrompt(Prompt):
    """A new prompt before or after frozen ones (Progressive Prompts, arXiv:2301.12314, section 3).

    In a causal model, earlier rows behind a new one attend to it; a new row behind them leaves their states as they were.
    """

    earlier: Tensor

    def __init__(self, rows: nn.Module, tokens: int, earlier_PD: Tensor, place: Place) -> None:
        super().__init__(rows, tokens + len(earlier_PD))
        self._tokens, self._place = tokens, place
        self.register_buffer("earlier", earlier_PD, persistent=False)

    def forward(self, indices_BP: Tensor) -> Tensor:
        new_BPD = super().forward(indices_BP[:, : self._tokens])
        earlier_BPD = self.earlier.to(new_BPD.dtype).expand(len(indices_BP), -1, -1)
        parts = (new_BPD, earlier_BPD) if self._place == "before" else (earlier_BPD, new_BPD)
        return torch.cat(parts, dim=1)
