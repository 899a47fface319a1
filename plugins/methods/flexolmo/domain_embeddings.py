"""Where an owner's router row begins: the direction in which the owner's text differs from public text.

Shapes: L = layers, d = width. In each layer the embedding of a domain is the mean of what the seed gives its
feed-forward there, brought to length 1; the row is the owner's embedding less the public one, scaled so that the
logit's root mean square over tokens of both texts is 1. Both embeddings have the same length, so a token halfway between
them gets the logit 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.models.feed_forwards import feed_forwards, input_moments
from ....experts.measures.embedder import SentenceEmbedder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from ....core.hooks.training import PrivateReleases
    from ....core.text.token_store import Blocks


@dataclass(frozen=True)
class DomainEmbedding:
    """What is known of a domain in the seed's own terms, float32."""

    rows: Tensor
    """Router rows (L, d)."""
    domain: Tensor
    """Mean of what the feed-forwards are given on the domain (L, d)."""
    public: Tensor
    """The same on public text."""


def hidden_state_embedding(
    model: PreTrainedModel, own: Sequence[NDArray[Any]], public: Sequence[NDArray[Any]]
) -> DomainEmbedding:
    """Return the embedding of a domain by the seed's hidden states; blocks are token arrays (tokens,)."""
    import torch

    domain, elsewhere = input_moments(model, own).mean, input_moments(model, public).mean
    away = torch.nn.functional.normalize(domain, dim=-1) - torch.nn.functional.normalize(elsewhere, dim=-1)
    rows = scaled_to_unit_logits(model, away.float(), [*own, *public])
    return DomainEmbedding(rows, domain.float(), elsewhere.float())


def private_hidden_state_embedding(
    model: PreTrainedModel,
    own: Blocks,
    public: Sequence[NDArray[Any]],
    private: PrivateReleases,
) -> DomainEmbedding:
    """Return the embedding of a private domain by the seed's hidden states, with noise.

    Of each block of the domain the mean input of every feed-forward counts, as its difference from the public mean in
    units of that one's length, all layers in one vector cut to the square root of their number. Scale and public
    mean are made of public text alone.
    """
    import torch

    elsewhere_Ld = input_moments(model, public).mean
    lengths_L1 = elsewhere_Ld.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def rows() -> Iterator[Tensor]:
        for index in range(len(own)):
            mean_Ld = input_moments(model, [own.block(index)[:-1]]).mean
            yield ((mean_Ld - elsewhere_Ld) / lengths_L1).flatten()

    away = private.embedding_mean(rows(), clip=len(elsewhere_Ld) ** 0.5)
    domain_Ld = elsewhere_Ld + away.reshape_as(elsewhere_Ld) * lengths_L1
    direction_Ld = torch.nn.functional.normalize(domain_Ld, dim=-1) - elsewhere_Ld / lengths_L1
    scaled = scaled_to_unit_logits(model, direction_Ld.float(), public)
    return DomainEmbedding(scaled, domain_Ld.float(), elsewhere_Ld.float())


def sentence_embedding(
    model: PreTrainedModel,
    folder: Path,
    own: Sequence[NDArray[Any]],
    public: Sequence[NDArray[Any]],
    texts: tuple[Sequence[str], Sequence[str]],
    seed: int = 0,
) -> DomainEmbedding:
    """Return the embedding of a domain by another model's sentence embeddings, projected at random onto the width.

    The projection is the same for everyone who uses the same `seed` and embedder; in every layer the direction is
    the same, and its scale that layer's own.
    """
    import torch

    embed = SentenceEmbedder(folder)
    away = torch.nn.functional.normalize(embed.mean(texts[0]), dim=0) - torch.nn.functional.normalize(
        embed.mean(texts[1]), dim=0
    )
    domain, elsewhere = input_moments(model, own).mean, input_moments(model, public).mean
    source = torch.Generator().manual_seed(seed)
    projection = torch.randn(domain.shape[-1], away.shape[0], generator=source) / away.shape[0] ** 0.5
    direction = (projection @ away).expand(domain.shape[0], -1)
    rows = scaled_to_unit_logits(model, direction, [*own, *public])
    return DomainEmbedding(rows, domain.float(), elsewhere.float())


def scaled_to_unit_logits(model: PreTrainedModel, away_Ld: Tensor, blocks: Sequence[NDArray[Any]]) -> Tensor:
    """Return directions scaled so that their products with the feed-forwards' inputs have a root mean square of 1."""
    import torch

    parts = feed_forwards(model)
    squares = torch.zeros(len(parts), dtype=torch.float64)
    tokens = 0

    def hook(layer: int) -> Any:
        def gather(module: Any, inputs: tuple[Tensor, ...]) -> None:
            logits = inputs[0].detach() @ away_Ld[layer].to(inputs[0])
            squares[layer] += float(logits.double().square().sum())

        return gather

    handles = [part.module.register_forward_pre_hook(hook(layer)) for layer, part in enumerate(parts)]
    try:
        with torch.inference_mode():
            for block in blocks:
                model(input_ids=torch.from_numpy(block[None]).to(model.device), use_cache=False)
                tokens += len(block)
    finally:
        for handle in handles:
            handle.remove()
    size = (squares / max(tokens, 1)).sqrt()
    return away_Ld / torch.where(size > 0, size, torch.ones_like(size)).float()[:, None]
