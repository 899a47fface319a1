"""FlexOlmo (arXiv:2507.07024): owners train a feed-forward each beside the frozen public one; merging concatenates.

Trainer `flexolmo`: attention, norms, embeddings, head and public feed-forward stay the seed's; the owner's
feed-forward, its router row and a bias that is never positive are all that trains. Merge method `flexolmo`: the public
feed-forward is the first expert, each owner's the next, each with the row that it was trained with. Afterwards the rows
may be tuned on public text (`expertctl tune --trains router`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....core.errors import UserError
from ....core.hooks.hookspecs import hookimpl
from ....core.hooks.merging import MergeMethod
from ....core.hooks.option_checks import check_at_least, check_positive
from ....core.hooks.text import TrainingText
from ....core.hooks.training import PrivateReleases, TrainablePart, Trainer
from ....merge.mixture.mixing import plan_mixture
from ....merge.mixture.options import MixtureOptions
from ....merge.mixture.routing.starts import ROUTER_FILE
from ....merge.mixture.routing.switching import without_experts

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from .domain_embeddings import DomainEmbedding


@dataclass(frozen=True)
class FlexOlmoTraining:
    """How an owner's expert trains."""

    public: str | None = None
    """Domain of public text, which the owner's is told apart from. Not set: what the seed was pretrained on."""
    embedding: str | None = None
    """Where the router row begins: `hidden` (mean hidden states of the seed), `none` (small random numbers), or the
    folder of a sentence-embedding model. Not set: `hidden`; with differential privacy `none`, or `hidden` with noise
    where `embedding_noise` is set."""
    bias: bool = True
    """Learn a bias of the owner's logit, never positive: the owner's part must win clearly."""
    coordinate: bool = True
    """Train beside the public feed-forward; without, the owner's trains alone and its row stays where it begins."""
    z_loss: float = 1e-3
    """Weight of the loss that keeps the router's logits small."""
    logit_size: float = 1.0
    """Root mean square of the router's logit, over tokens of both texts, where it begins."""
    samples: int = 64
    """Blocks of each text that the embedding looks at."""

    def __post_init__(self) -> None:
        check_at_least("z_loss", self.z_loss, 0)
        check_positive("logit_size", self.logit_size)
        check_at_least("samples", self.samples, 1)


def prepare(model: PreTrainedModel, options: FlexOlmoTraining, text: TrainingText) -> TrainablePart:
    """Freeze the seed and return what the owner trains; raises `UserError` where there is no public text."""
    import torch

    from .coordinated import coordinate, z_loss

    embedding = _embedding(model, options, text)
    parts = coordinate(model, _rows(model, embedding, options.logit_size), bias=options.bias)
    parameters = _own_parameters(model)
    if options.coordinate:
        parameters |= {f"router.{layer}.row": part.row for layer, part in enumerate(parts)}
        if options.bias:
            parameters |= {f"router.{layer}.bias": part.bias for layer, part in enumerate(parts)}
    else:
        for part in parts:
            part.row.requires_grad_(False)
            part.bias.requires_grad_(False)
            part.forward = part.own.forward  # type: ignore[method-assign]  # the ablation: the owner's part alone

    def trained() -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in _own_parameters(model).items()}

    def beside() -> Mapping[str, Mapping[str, Tensor]]:
        found = {
            "rows": torch.stack([part.row.detach() for part in parts]).cpu(),
            "biases": torch.stack([part.bias.detach().clamp(max=0) for part in parts]).cpu(),
        }
        if embedding is not None:
            found |= {"domain": embedding.domain, "public": embedding.public}
        return {ROUTER_FILE: found}

    uses_z = options.z_loss > 0 and options.coordinate
    return TrainablePart(
        model,
        parameters,
        auxiliary_loss=(lambda: options.z_loss * z_loss(parts)) if uses_z else None,
        auxiliary_per_example=True,
        tensors=trained,
        beside=beside,
    )


def restore(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Make the seed into the two experts side by side that an owner trained."""
    import torch

    from ....core.artefacts.safetensors_io import Checkpoint
    from ....core.models.loading import WEIGHTS_FILE
    from .coordinated import coordinate

    router = Checkpoint([folder / ROUTER_FILE])
    rows, biases = router.read("rows").to(model.dtype), router.read("biases").to(model.dtype)
    parts = coordinate(model, rows, bias=True)
    own = Checkpoint([folder / WEIGHTS_FILE])
    with torch.no_grad():
        for name, parameter in _own_parameters(model).items():
            if name in own:
                parameter.copy_(own.read(name))
        for layer, part in enumerate(parts):
            part.bias.copy_(biases[layer])
    return model


def _own_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the owners' feed-forwards' parameters by the seed's names."""
    from .coordinated import CoordinatedFeedForward

    return {
        f"{place}.{name}": parameter
        for place, module in model.named_modules()
        if isinstance(module, CoordinatedFeedForward)
        for name, parameter in module.own.named_parameters()
    }


def _embedding(
    model: PreTrainedModel, options: FlexOlmoTraining, text: TrainingText
) -> DomainEmbedding | None:
    if options.embedding == "none":
        return None
    if text.private is not None:
        return _private_embedding(model, options, text, text.private)
    from ....core.models.feed_forwards import spread_blocks
    from ....core.models.loading import load_tokenizer
    from .domain_embeddings import hidden_state_embedding, sentence_embedding

    public = _public_blocks(options, text)
    own = [
        block
        for blocks in text.domains.values()
        for block in spread_blocks(blocks, max(options.samples // len(text.domains), 1))
    ]
    if options.embedding in (None, "hidden"):
        return hidden_state_embedding(model, own, public)
    tokenizer = load_tokenizer(text.folder)
    texts = tuple([str(tokenizer.decode(block)) for block in blocks] for blocks in (own, public))
    return sentence_embedding(model, Path(options.embedding).expanduser(), own, public, (texts[0], texts[1]))


def _private_embedding(
    model: PreTrainedModel, options: FlexOlmoTraining, text: TrainingText, private: PrivateReleases
) -> DomainEmbedding | None:
    """Return the embedding with noise, or None where none may be released; raises `UserError` if one is asked for."""
    from .domain_embeddings import private_hidden_state_embedding

    if options.embedding not in (None, "hidden"):
        raise UserError(
            "with differential privacy the router row begins with --option embedding=none or hidden; sentence embeddings "
            "get no noise"
        )
    if options.embedding is None and not private.releases_embedding:
        return None
    if not private.releases_embedding:
        raise UserError(
            "the mean embedding of private text tells of that text; pay for it with --dp ...,embedding_noise=5, or begin "
            "with --option embedding=none"
        )
    ((name, own),) = text.domains.items()
    if name in (options.public, *text.seed_domains):
        raise UserError(
            f"'{name}' cannot be private and public text at once; name other public text with --option public=DOMAIN"
        )
    return private_hidden_state_embedding(model, own, _public_blocks(options, text), private)


def _public_blocks(options: FlexOlmoTraining, text: TrainingText) -> list[NDArray[Any]]:
    """Return blocks of public text; raises `UserError` where none is known."""
    from ....core.models.feed_forwards import spread_blocks

    names = (options.public,) if options.public is not None else text.seed_domains
    if not names:
        raise UserError(
            "the router row begins where the owner's text differs from public text, and none is known; name a "
            "domain of public text with --option public=DOMAIN, or begin with --option embedding=none"
        )
    share = max(options.samples // len(names), 1)
    return [block for name in names for block in spread_blocks(text.other(name), share)]


def _rows(model: PreTrainedModel, embedding: DomainEmbedding | None, size: float) -> Tensor:
    """Return the rows to begin with, (L, d); without an embedding the paper's: normal, deviation 0.002, never positive."""
    import torch

    from ....core.models.feed_forwards import feed_forwards

    if embedding is not None:
        return embedding.rows * size
    shape = (len(feed_forwards(model)), int(model.config.hidden_size))
    return torch.nn.init.trunc_normal_(torch.empty(shape), std=0.002, a=-0.006, b=0.0)


@dataclass(frozen=True)
class FlexOlmoMerge(MixtureOptions):
    """A mixture of the seed's and the owners' feed-forwards, with the rows that the owners trained."""

    top_k: int | None = None
    """Experts that each token passes through. Not set: 4, or all where there are fewer."""
    router: str = "embedding"
    with_seed: bool = True
    bias: Literal["auto", "fold", "drop", "carry"] = "drop"
    usual_top_k: ClassVar[int] = 4


@hookimpl
def trainers() -> list[Trainer]:
    return [
        Trainer(
            "flexolmo",
            "the owner's feed-forward beside the frozen public one, with a router row",
            prepare,
            FlexOlmoTraining,
            uses_text=True,
            private_text=True,
            restore=restore,
            changes="feed_forward",
        )
    ]


@hookimpl
def merge_methods() -> list[MergeMethod]:
    return [
        MergeMethod(
            name="flexolmo",
            summary="one mixture of experts: the public feed-forward and the owners', concatenated",
            assemble=plan_mixture,
            kind="moe",
            options=FlexOlmoMerge,
            switch_off=without_experts,
        )
    ]
