"""Merge method `mixture` and the built-in router initialisations."""

from __future__ import annotations

from typing import Any

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.merging import Assembler, MergeMethod
from ...core.hooks.mixtures import RouterStart
from ...merge.mixture.mixing import plan_mixture
from ...merge.mixture.options import MixtureOptions
from ...merge.mixture.routing.prompt_starts import prompt_rows, prompt_state_rows, prompt_token_rows
from ...merge.mixture.routing.ridge import ridge_rows
from ...merge.mixture.routing.starts import embedding_rows, hidden_rows, linear_rows, random_rows, uniform_rows
from ...merge.mixture.routing.switching import without_experts


def mixture_classes() -> tuple[type, type]:
    """Return the classes that `AutoConfig` and `AutoModelForCausalLM` resolve for the container."""
    from ...merge.mixture.container import MixtureConfig, MixtureForCausalLM

    return MixtureConfig, MixtureForCausalLM


def mixture_method(name: str, summary: str, options: type[MixtureOptions], **fields: Any) -> MergeMethod:
    """Return a merge method that plans a mixture with the defaults of its options."""
    return Assembler(name, summary, assemble=plan_mixture, switch_off=without_experts, options=options, **fields)


@hookimpl
def merge_methods() -> list[MergeMethod]:
    summary = "mixture of experts: the experts' feed-forward networks, all other tensors from the seed"
    return [mixture_method("mixture", summary, MixtureOptions, auto_classes=mixture_classes)]


@hookimpl
def router_starts() -> list[RouterStart]:
    return [
        RouterStart("random", "normally distributed rows", random_rows),
        RouterStart("linear", "uniformly distributed rows, as in torch.nn.Linear", linear_rows),
        RouterStart("uniform", "rows of 0: equal logits for all experts", uniform_rows),
        RouterStart("embedding", "router rows trained with the experts (trainer flexolmo)", embedding_rows),
        RouterStart("prompts", "hidden states of positive and negative prompts", prompt_rows, uses_model=True),
        RouterStart(
            "prompt_states",
            "layer inputs at the last token of prompts, as in mergekit-moe",
            prompt_state_rows,
            uses_model=True,
        ),
        RouterStart(
            "prompt_tokens", "token embeddings of prompts, the same in every layer", prompt_token_rows, uses_model=True
        ),
        RouterStart(
            "hidden",
            "linear discriminants of hidden states of validation text",
            hidden_rows,
            uses_model=True,
            uses_text=True,
        ),
        RouterStart(
            "ridge",
            "ridge regression of the experts' labels on hidden states of validation text",
            ridge_rows,
            uses_model=True,
            uses_text=True,
            runs_experts=True,
        ),
    ]
