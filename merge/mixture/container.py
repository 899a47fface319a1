"""A mixture of experts for any family: its decoder as transformers has it, with experts in place of feed-forwards.

For families without a mixture class of their own, and for mixtures that such a class cannot express. Shapes: B =
batch, T = tokens, N = B T, E = experts, k = experts of a token, d = width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel

from ...core.errors import UserError
from ...core.models.kernels.sorted_loop import mixed
from ...core.models.kernels.top_k_gates import top_k_gates
from ..sources.shared_settings import SHARED_SETTINGS
from .targets import CONTAINER_TYPE


class MixtureConfig(PretrainedConfig):
    """A dense model's configuration, and how many experts stand in place of each feed-forward."""

    model_type = CONTAINER_TYPE

    def __init__(
        self,
        member: Mapping[str, Any] | None = None,
        feed_forward: str = "mlp",
        num_experts: int = 1,
        num_experts_per_tok: int = 1,
        norm_topk_prob: bool = True,
        router_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        self.member = dict(member or {})
        """`config.json` of the dense model."""
        self.feed_forward = feed_forward
        """What its layers call their feed-forward."""
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.router_bias = router_bias
        if self.member:
            dense = self.dense()
            for name in (*SHARED_SETTINGS, "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(dense, name, None))
        super().__init__(**kwargs)

    def dense(self) -> PretrainedConfig:
        """Return the dense model's configuration as its class reads it."""
        settings = dict(self.member)
        found: PretrainedConfig = AutoConfig.for_model(settings.pop("model_type"), **settings)
        return found


class TopKRouter(nn.Module):
    """Chooses k experts for each token by the largest of E logits."""

    def __init__(self, config: MixtureConfig, width: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_experts
        self.normalized = config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts, width))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None

    def forward(self, hidden_Nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logits (N, E), gates (N, k), experts (N, k)) as transformers' own routers do."""
        logits_NE = nn.functional.linear(hidden_Nd, self.weight, self.bias)
        gates_Nk, chosen_Nk = top_k_gates(logits_NE, self.top_k, normalized=self.normalized)
        return logits_NE, gates_Nk.to(hidden_Nd.dtype), chosen_Nk


class MixtureFeedForward(nn.Module):
    """Experts side by side; each token passes through those that its router chooses."""

    def __init__(self, experts: list[nn.Module], router: TopKRouter) -> None:
        super().__init__()
        given = [one for one in signature(experts[0].forward).parameters.values() if one.default is one.empty]
        if len(given) != 1:
            raise UserError(
                f"its feed-forward ({type(experts[0]).__name__}) takes {', '.join(one.name for one in given)}, and "
                "experts are given hidden states alone: this family cannot become a mixture"
            )
        self.experts = nn.ModuleList(experts)
        self.router = router

    def forward(self, hidden_BTd: Tensor) -> Tensor:
        hidden_Nd = hidden_BTd.reshape(-1, hidden_BTd.shape[-1])
        _, gates_Nk, chosen_Nk = self.router(hidden_Nd)
        return mixed(list(self.experts), hidden_Nd, gates_Nk, chosen_Nk).view_as(hidden_BTd)


class MixtureForCausalLM(PreTrainedModel, GenerationMixin):
    """A dense decoder whose feed-forwards are mixtures of experts."""

    config_class = MixtureConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        dense = config.dense()
        if config._attn_implementation not in (None, "sdpa"):  # the default here, which not every family has
            dense._attn_implementation = config._attn_implementation
        dense.dtype = None  # the dense model's; this one is made in whatever it is loaded in
        self.network: PreTrainedModel = AutoModelForCausalLM.from_config(dense)
        for name, module in list(self.network.named_modules()):
            if name.split(".")[-1] == config.feed_forward and name.count(".") >= 2:
                parent = self.network.get_submodule(name.rpartition(".")[0])
                experts = [module, *(copy.deepcopy(module) for _ in range(config.num_experts - 1))]
                router = TopKRouter(config, int(dense.hidden_size))
                setattr(parent, config.feed_forward, MixtureFeedForward(experts, router))
        self.supports_gradient_checkpointing = self.network.supports_gradient_checkpointing
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave everything as it was made: all weights are loaded."""

    def get_input_embeddings(self) -> nn.Module:
        return cast("nn.Module", self.network.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.network.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.network.set_output_embeddings(new_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return cast("nn.Module", self.network.get_output_embeddings())

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Do as the dense model's class, and keep its new size in both configurations."""
        resize: Callable[..., nn.Module] = self.network.resize_token_embeddings
        found = resize(*args, **kwargs)
        self.config.vocab_size = self.config.member["vocab_size"] = self.network.config.vocab_size
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the dense model's class does; see there. Named are those that transformers' tools look for by name."""
        named = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
        }
        given = {
            name: value for name, value in named.items() if value is not None
        }  # not all families take all
        return self.network(input_ids=input_ids, **given, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the dense model's class does, which knows its own masks, positions and caches.

        `forward` of the container, and hooks on it, take no part.
        """
        self.network.generation_config = self.generation_config
        return cast("PreTrainedModel", self.network).generate(*args, **kwargs)
