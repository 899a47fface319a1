"""Built-in trainers: train everything, or the feed-forwards only."""

from __future__ import annotations

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.training import Trainer
from ...experts.runs.trainable import all_parameters, feed_forward_parameters


@hookimpl
def trainers() -> list[Trainer]:
    return [
        Trainer("all", "every parameter", all_parameters),
        Trainer(
            "feed_forward",
            "the feed-forwards only; attention, norms and embeddings stay the seed's",
            feed_forward_parameters,
            changes="feed_forward",
        ),
    ]
