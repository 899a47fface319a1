"""Built-in trainers: all parameters, or the feed-forward networks only."""

from __future__ import annotations

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.training import Trainer
from ...experts.runs.trainable import all_parameters, feed_forward_parameters


@hookimpl
def trainers() -> list[Trainer]:
    return [
        Trainer("all", "every parameter", lambda context: all_parameters(context.model), reads_weights=False),
        Trainer(
            "feed_forward",
            "the feed-forward networks only; attention, norms and embeddings stay frozen",
            lambda context: feed_forward_parameters(context.model),
            changes="feed_forward",
            reads_weights=False,
        ),
    ]
