"""Dense models of a mixture: what it computes if every token is routed to one expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.artefacts.model_config import is_tied, with_floats
from ...core.artefacts.numeric import decode
from ...core.errors import UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.merging import MergeMethod, TensorMerge
from ..engine.actions import MergeTools, action_of
from ..engine.reading import Reader
from ..engine.tensor_plan import TensorPlan
from ..planning.assembly import ExpertParts
from ..sources.models import DERIVED
from ..sources.tensor_names import head_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class ExpertModels:
    """Calling it with the name of an expert returns the expert's model; one model is in memory, in float32.

    Its tensors are rounded to the mixture's dtype. They come from the mixture's inputs, since the mixture is not
    written yet.
    """

    def __init__(
        self,
        dense: Mapping[str, Any],
        shared: Mapping[str, TensorPlan],
        experts: Sequence[ExpertParts],
        dtype: str | None = None,
    ) -> None:
        """Plan the models; `dtype` is the mixture's dtype, by default that of the experts' tensors."""
        self._config, self._shared = dense, shared
        self._experts = {expert.name: expert for expert in experts}
        self._dtype = dtype or next(iter(experts[0].feed_forward.values())).dtype
        self._model: PreTrainedModel | None = None
        self._loaded: str | None = None

    def __call__(self, expert: str) -> PreTrainedModel:
        """Return the model of one expert in evaluation mode; it is valid until the next call."""
        if self._model is None:
            self._model = self._build(expert)
        elif self._loaded != expert:
            self._overlay(self._model, self._feed_forward(expert))
        self._loaded = expert
        return self._model

    def _build(self, expert: str) -> PreTrainedModel:
        from ...core.models.stored_names import StoredNames

        model = _empty_model(self._config, is_headed=head_name(self._shared) is not None)
        names = StoredNames(model)
        plans = [plan for name, plan in self._shared.items() if name in names.in_memory or not name.endswith(DERIVED)]
        plans = [*plans, *self._feed_forward(expert)]
        missing = names.missing_in({plan.name for plan in plans})
        if missing:
            raise UserError(
                f"experts of family '{model.config.model_type}' cannot be run one by one: their checkpoints have no tensor "
                f"'{missing[0]}'; choose a router that does not run them, such as router=hidden"
            )
        self._overlay(model, plans)
        return model

    def _feed_forward(self, expert: str) -> list[TensorPlan]:
        parts = self._experts[expert]
        return [
            TensorPlan(name, self._dtype, stored.shape, "copy", (stored,), (expert,))
            for name, stored in parts.feed_forward.items()
        ]

    def _overlay(self, model: PreTrainedModel, plans: Iterable[TensorPlan]) -> None:
        from ...core.models.overlay import Overlay

        average = installed_plugins().offer(MergeMethod, "average")
        assert isinstance(average, TensorMerge)
        overlay = Overlay(model)
        with Reader() as reader:
            tools = MergeTools(average, reader)
            for plan in plans:
                overlay.add(plan.name, _planned_values(plan, tools))
        overlay.finish()


def _planned_values(plan: TensorPlan, tools: MergeTools) -> Tensor:
    """Return the numbers of a planned tensor as the engine would write them, in float32 (or float64)."""
    import torch

    # a piece is valid until the next one is read
    content = b"".join(bytes(piece) for piece in action_of(plan, tools).pieces())
    return torch.from_numpy(np.array(decode(content, plan.dtype, plan.shape)))


def _empty_model(config: Mapping[str, Any], *, is_headed: bool) -> PreTrainedModel:
    """Return a float32 model of a configuration, with random weights; `is_headed`: it has an output head of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ...core.process.compute import best_device

    settings = with_floats(config)
    if is_headed and is_tied(settings):
        settings["tie_word_embeddings"] = False
    with torch.device(best_device()):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    return model.eval()
