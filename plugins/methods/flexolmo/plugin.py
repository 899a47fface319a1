"""FlexOlmo (arXiv:2507.07024): each owner trains a feed-forward network beside the frozen public one.

Trainer `flexolmo` trains the owner's feed-forward networks, router rows and non-positive biases; all other
parameters are frozen at the seed's. Merge method `flexolmo` builds a mixture of the public feed-forward
network and the owners', each with the router row that it was trained with. The rows can then be fine-tuned on
public text (`expertctl tune --trains router`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....core.artefacts.files import read_json
from ....core.artefacts.model_config import LAYER_KEYS, text_config
from ....core.errors import UserError
from ....core.hooks.hookspecs import hookimpl
from ....core.hooks.merging import MergeMethod
from ....core.hooks.option_checks import check_at_least, check_positive
from ....core.hooks.training import PrivateReleases, SideTensor, TrainablePart, Trainer, TrainingContext, TrainingText
from ....merge.mixture.options import MixtureOptions
from ....merge.mixture.routing.starts import ROUTER_FILE
from ..mixtures import mixture_method

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from .coordinated import CoordinatedFeedForward
    from .domain_embeddings import DomainEmbedding


LARGEST_ROW = 30.0
"""Largest number in a router file that training can lead to; hidden states and logits begin with sizes of about 1."""


@dataclass(frozen=True)
class FlexOlmoTraining:
    """Training options of an owner's expert."""

    public: str | None = None
    """Domain of public text to contrast the owner's with. Not set: the seed's pretraining domains."""
    embedding: str | None = None
    """Initialisation of the router row: `hidden` (mean hidden states of the seed), `none` (small random
    values), or the folder of a sentence-embedding model. Not set: `hidden`; with differential privacy `none`,
    or `hidden` with noise if `embedding_noise` is set."""
    bias: Literal["clamp", "softplus", "none"] = "clamp"
    """Non-positive bias of the owner's logit, which selects the owner's expert only by a clear margin: `clamp` trains
    min(b, 0) from b = 0, as the authors' code does; `softplus` trains -softplus(b), which always has a gradient."""
    coordinate: bool = True
    """Train beside the public FFN; if false, train the owner's FFN alone with a frozen row."""
    z_loss: float = 1e-3
    """Weight of the router z-loss, which keeps the logits small."""
    logit_size: float = 1.0
    """Initial root mean square of the router logit over tokens of both texts."""
    samples: int = 64
    """Number of blocks of each text for the embedding."""

    def __post_init__(self) -> None:
        check_at_least("z_loss", self.z_loss, 0)
        check_positive("logit_size", self.logit_size)
        check_at_least("samples", self.samples, 1)


class CoordinatedPart(TrainablePart):
    """An owner's feed-forward networks beside the seed's, and the router between the two."""

    auxiliary_per_example = True

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Mapping[str, nn.Parameter],
        parts: Sequence[CoordinatedFeedForward],
        z_weight: float,
        embedding: DomainEmbedding | None,
    ) -> None:
        super().__init__(model, parameters)
        self._parts, self._z_weight, self._embedding = parts, z_weight, embedding

    def auxiliary_loss(self) -> Tensor | None:
        from .coordinated import z_loss

        return self._z_weight * z_loss(self._parts) if self._z_weight > 0 else None

    def tensors(self) -> Mapping[str, Tensor]:
        return {name: tensor.detach() for name, tensor in _own_parameters(self.module).items()}

    def extra_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        import torch

        tensors = {
            "rows": torch.stack([part.logit.row.detach() for part in self._parts]).cpu(),
            "biases": torch.stack([part.logit.non_positive_bias().detach() for part in self._parts]).cpu(),
        }
        if self._embedding is not None:
            tensors |= {"domain": self._embedding.domain, "public": self._embedding.public}
        return {ROUTER_FILE: tensors}


def prepare(context: TrainingContext) -> TrainablePart:
    """Freeze the seed and add the owner's parameters; raises `UserError` if there is no public text."""
    from .coordinated import coordinate

    model = context.model
    options: FlexOlmoTraining = context.options
    embedding = _embedding(model, options, context.text)
    parts = coordinate(model, _rows(model, embedding, options.logit_size), bias=options.bias)
    parameters = _own_parameters(model)
    if options.coordinate:
        parameters |= {f"router.{layer}.row": part.logit.row for layer, part in enumerate(parts)}
        if options.bias != "none":
            parameters |= {f"router.{layer}.bias": part.logit.bias for layer, part in enumerate(parts)}
    else:
        for part in parts:
            part.logit.requires_grad_(False)
            part.forward = part.own.forward  # type: ignore[method-assign]  # ablation: only the owner's network

    z_weight = options.z_loss if options.coordinate else 0.0
    return CoordinatedPart(model, parameters, parts, z_weight, embedding)


def restore(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Convert the seed into the coordinated model that an owner trained."""
    import torch

    from ....core.artefacts.safetensors_io import Checkpoint
    from ....core.models.loading import WEIGHTS_FILE
    from ....core.models.overlay import tensors_in_memory
    from .coordinated import coordinate

    router = Checkpoint([folder / ROUTER_FILE])
    rows, biases = router.read("rows").to(model.dtype), router.read("biases").to(model.dtype)
    trained = tensors_in_memory(model, Checkpoint([folder / WEIGHTS_FILE]))
    parts = coordinate(model, rows, bias="clamp")
    with torch.no_grad():
        for name, parameter in _own_parameters(model).items():
            if name in trained:
                parameter.copy_(trained[name])
        for layer, part in enumerate(parts):
            part.logit.bias.copy_(biases[layer])
    return model


def _own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the owner's feed-forward networks, by their names in the seed."""
    from .coordinated import CoordinatedFeedForward

    return {
        f"{module_name}.{name}": parameter
        for module_name, module in model.named_modules()
        if isinstance(module, CoordinatedFeedForward)
        for name, parameter in module.own.named_parameters()
    }


def _embedding(model: PreTrainedModel, options: FlexOlmoTraining, text: TrainingText) -> DomainEmbedding | None:
    if options.embedding == "none":
        return None
    if text.private is not None:
        return _private_embedding(model, options, text, text.private)
    from ....core.models.feed_forwards import spread_blocks
    from ....core.text.tokenizer import load_tokenizer
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
    """Return the embedding with noise, or None if none is requested; raises `UserError` without a budget for it."""
    from .domain_embeddings import private_hidden_state_embedding

    if options.embedding not in (None, "hidden"):
        raise UserError(
            "sentence embeddings are not supported with differential privacy; use --option embedding=none or hidden"
        )
    if options.embedding is None and not private.releases_embedding:
        return None
    if not private.releases_embedding:
        raise UserError(
            "the mean embedding of private text reveals information about that text; add noise with --dp "
            "...,embedding_noise=5, or use --option embedding=none"
        )
    ((name, own),) = text.domains.items()
    if name in (options.public, *text.seed_domains):
        raise UserError(
            f"'{name}' cannot be both private and public text; name another domain of public text with "
            "--option public=DOMAIN"
        )
    return private_hidden_state_embedding(model, own, _public_blocks(options, text), private)


def _public_blocks(options: FlexOlmoTraining, text: TrainingText) -> list[NDArray[Any]]:
    """Return blocks of public text; raises `UserError` if there is none."""
    from ....core.models.feed_forwards import spread_blocks

    names = (options.public,) if options.public is not None else text.seed_domains
    if not names:
        raise UserError(
            "the initial router row needs public text, and no domain of it is known; name one with --option "
            "public=DOMAIN, or use --option embedding=none"
        )
    count = max(options.samples // len(names), 1)
    return [block for name in names for block in spread_blocks(text.other(name), count)]


def _rows(model: PreTrainedModel, embedding: DomainEmbedding | None, size: float) -> Tensor:
    """Return the initial rows, (L, d).

    Without an embedding they are normally distributed with standard deviation 0.002, truncated to
    non-positive values, as in the paper.
    """
    import torch

    from ....core.models.feed_forwards import feed_forwards

    if embedding is not None:
        return embedding.rows * size
    shape = (len(feed_forwards(model)), int(model.config.hidden_size))
    return torch.nn.init.trunc_normal_(torch.empty(shape), std=0.002, a=-0.006, b=0.0)


def router_file(seed: Path, options: FlexOlmoTraining) -> Mapping[str, Mapping[str, SideTensor]]:
    """Return the tensors of an expert's router file; L = layers, d = hidden size.

    Rows of more than a few units would give an owner's expert every token of everybody's text.
    """
    config = text_config(read_json(seed / "config.json"))
    layers = next(int(config[key]) for key in LAYER_KEYS if key in config)
    width = next(int(config[key]) for key in ("hidden_size", "n_embd", "d_model") if key in config)
    embedding = SideTensor((layers, width), -LARGEST_ROW, LARGEST_ROW, is_required=False)
    tensors = {
        "rows": SideTensor((layers, width), -LARGEST_ROW, LARGEST_ROW),
        "biases": SideTensor((layers,), -LARGEST_ROW, 0.0),
    }
    return {ROUTER_FILE: tensors | {"domain": embedding, "public": embedding}}


@dataclass(frozen=True)
class FlexOlmoMerge(MixtureOptions):
    """Mixture options with the seed as an expert and the router rows trained by the owners."""

    top_k: int | None = None
    """Number of experts per token. Not set: 4, or all if there are fewer."""
    router: str = "embedding"
    with_seed: bool = True
    bias: Literal["auto", "fold", "drop", "carry"] = "drop"
    usual_top_k: ClassVar[int] = 4


@hookimpl
def trainers() -> list[Trainer]:
    return [
        Trainer(
            "flexolmo",
            "feed-forward networks and router row of an owner, beside the frozen public feed-forward networks",
            prepare,
            FlexOlmoTraining,
            uses_text=True,
            private_text=True,
            restore=restore,
            changes="feed_forward",
            side_files=router_file,
        )
    ]


@hookimpl
def merge_methods() -> list[MergeMethod]:
    summary = "mixture of experts: public and owners' feed-forward networks with trained router rows"
    return [mixture_method("flexolmo", summary, FlexOlmoMerge)]
