"""Mixtures of given experts, and the ways to begin their routers."""

from __future__ import annotations

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.merging import MergeMethod
from ...core.hooks.mixtures import Router
from ...merge.mixture.mixing import plan_mixture
from ...merge.mixture.options import MixtureOptions
from ...merge.mixture.routing.prompt_starts import prompt_rows, prompt_state_rows, prompt_token_rows
from ...merge.mixture.routing.starts import (
    embedding_rows,
    hidden_rows,
    linear_rows,
    random_rows,
    uniform_rows,
)
from ...merge.mixture.routing.switching import without_experts


def mixture_classes() -> tuple[type, type]:
    """Return what `AutoConfig` and `AutoModelForCausalLM` need to know to load the container."""
    from ...merge.mixture.container import MixtureConfig, MixtureForCausalLM

    return MixtureConfig, MixtureForCausalLM


@hookimpl
def merge_methods() -> list[MergeMethod]:
    return [
        MergeMethod(
            name="mixture",
            summary="one mixture of experts: the experts' feed-forwards on the seed's attention",
            assemble=plan_mixture,
            kind="moe",
            switch_off=without_experts,
            options=MixtureOptions,
            auto_classes=mixture_classes,
        )
    ]


@hookimpl
def routers() -> list[Router]:
    return [
        Router("random", "normal rows, drawn by a seed", random_rows),
        Router("linear", "even numbers, as a linear layer of torch begins, drawn by a seed", linear_rows),
        Router("uniform", "rows of 0: all experts alike", uniform_rows),
        Router("embedding", "the rows that experts were trained with (flexolmo)", embedding_rows),
        Router("prompts", "hidden states of positive and negative prompts", prompt_rows, uses_model=True),
        Router(
            "prompt_states",
            "what layers are given at the last token of prompts, as mergekit-moe has it",
            prompt_state_rows,
            uses_model=True,
        ),
        Router(
            "prompt_tokens",
            "token embeddings of prompts, the same in every layer",
            prompt_token_rows,
            uses_model=True,
        ),
        Router(
            "hidden",
            "linear discriminants of hidden states of validation text",
            hidden_rows,
            uses_model=True,
            uses_text=True,
        ),
    ]
