"""Initial router row of an owner: the direction in which the owner's text differs from public text.

Shapes: L = layers, d = hidden size. The embedding of a domain in a layer is the normalized mean input of the seed's
feed-forward network. The row is the owner's embedding minus the public one, scaled to a root mean square of 1 of the
logits over tokens of both texts. Since both embeddings have unit norm, a token halfway between them has logit 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from ....core.hooks.training import PrivateReleases
from ....core.models.feed_forwards import input_moments, observe_inputs
from ....core.text.token_store import TokenBlocks
from ....experts.measures.embedder import SentenceEmbedder


@dataclass(frozen=True)
class DomainEmbedding:
    """Router rows and mean hidden states of a domain, float32."""

    rows: Tensor
    """Router rows (L, d)."""
    domain: Tensor
    """Mean inputs of the feed-forward networks on the domain (L, d)."""
    public: Tensor
    """Mean inputs of the feed-forward networks on public text (L, d)."""


def hidden_state_embedding(
    model: PreTrainedModel, own: Sequence[NDArray[Any]], public: Sequence[NDArray[Any]]
) -> DomainEmbedding:
    """Return the embedding of a domain by the seed's hidden states; blocks are token arrays (tokens,)."""
    domain, public_mean = input_moments(model, own).mean, input_moments(model, public).mean
    direction = normalize(domain, dim=-1) - normalize(public_mean, dim=-1)
    rows = scale_to_unit_logits(model, direction.float(), [*own, *public])
    return DomainEmbedding(rows, domain.float(), public_mean.float())


def private_hidden_state_embedding(
    model: PreTrainedModel, own: TokenBlocks, public: Sequence[NDArray[Any]], private: PrivateReleases
) -> DomainEmbedding:
    """Return the differentially private embedding of a domain by the seed's hidden states.

    Each block contributes the mean inputs of all feed-forward networks, minus the public means and divided by their
    norms, as one vector clipped to a norm of sqrt(L). Scale and public means depend on public text only.
    """
    public_Ld = input_moments(model, public).mean
    norms_L1 = public_Ld.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def rows() -> Iterator[Tensor]:
        for index in range(len(own)):
            mean_Ld = input_moments(model, [own.block(index)[:-1]]).mean
            yield ((mean_Ld - public_Ld) / norms_L1).flatten()

    offset = private.embedding_mean(rows(), clip=len(public_Ld) ** 0.5)
    domain_Ld = public_Ld + offset.reshape_as(public_Ld) * norms_L1
    direction_Ld = normalize(domain_Ld, dim=-1) - public_Ld / norms_L1
    scaled = scale_to_unit_logits(model, direction_Ld.float(), public)
    return DomainEmbedding(scaled, domain_Ld.float(), public_Ld.float())


def sentence_embedding(
    model: PreTrainedModel,
    folder: Path,
    own: Sequence[NDArray[Any]],
    public: Sequence[NDArray[Any]],
    texts: tuple[Sequence[str], Sequence[str]],
    seed: int = 0,
) -> DomainEmbedding:
    """Return the embedding of a domain by a sentence-embedding model, projected to the hidden size at random.

    The projection depends only on `seed` and the embedding size. All layers share the direction; the scale is
    set per layer.
    """
    embed = SentenceEmbedder(folder)
    difference = normalize(embed.mean(texts[0]), dim=0) - normalize(embed.mean(texts[1]), dim=0)
    domain, public_mean = input_moments(model, own).mean, input_moments(model, public).mean
    generator = torch.Generator().manual_seed(seed)
    size = difference.shape[0]
    projection = torch.randn(domain.shape[-1], size, generator=generator) / size**0.5
    direction = (projection @ difference).expand(domain.shape[0], -1)
    rows = scale_to_unit_logits(model, direction, [*own, *public])
    return DomainEmbedding(rows, domain.float(), public_mean.float())


def scale_to_unit_logits(model: PreTrainedModel, direction_Ld: Tensor, blocks: Sequence[NDArray[Any]]) -> Tensor:
    """Return directions scaled to a root mean square of 1 of their products with the feed-forward inputs."""
    squares = torch.zeros(len(direction_Ld), dtype=torch.float64)

    def accumulate(layer: int, inputs: Tensor) -> None:
        logits = inputs @ direction_Ld[layer].to(inputs)
        squares[layer] += float(logits.double().square().sum())

    tokens = observe_inputs(model, blocks, accumulate)
    rms = (squares / max(tokens, 1)).sqrt()
    return direction_Ld / torch.where(rms > 0, rms, torch.ones_like(rms)).float()[:, None]
