"""Built-in trainers: all parameters, or the feed-forward networks only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.hooks.architectures import architecture_of
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.training import Trainer
from ...experts.runs.trainable import all_parameters, matching_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@hookimpl
def trainers() -> list[Trainer]:
    return [
        Trainer("all", "every parameter", lambda context: all_parameters(context.model)),
        Trainer(
            "feed_forward",
            "the feed-forward networks only; attention, norms and embeddings stay frozen",
            lambda context: matching_parameters(context.model, _feed_forward(context.model)),
            changes="feed_forward",
        ),
    ]


def _feed_forward(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the patterns of the feed-forward tensors of a model's family."""
    return architecture_of(model.config.model_type, (name for name, _ in model.named_parameters())).feed_forward
