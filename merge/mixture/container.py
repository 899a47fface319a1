"""Mixture of experts for any model family: a transformers decoder with MoE layers as feed-forward networks.

For families without a mixture class in transformers, and for mixtures that such a class cannot represent.
Shapes: B = batch, T = tokens, N = B T, E = experts, k = experts per token, d = hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel

from ...core.artefacts.model_config import with_floats
from ...core.models.feed_forwards import require_plain, require_replaceable
from ...core.models.kernels.sorted_loop import combine_experts
from ...core.models.kernels.top_k_gates import top_k_gates
from ..sources.shared_settings import SHARED_SETTINGS
from .targets import CONTAINER_TYPE


class MixtureConfig(PretrainedConfig):
    """Configuration of a dense model and of the mixture that replaces each of its feed-forward networks."""

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
        """Module name of the feed-forward network within a layer."""
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
        """Return the dense model's configuration as an instance of its transformers class."""
        config: PretrainedConfig = AutoConfig.for_model(**with_floats(self.member))
        return config


class TopKRouter(nn.Module):
    """Top-k router: selects the k experts with the largest of E logits for each token."""

    def __init__(self, config: MixtureConfig, width: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_experts
        self.normalized = config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts, width))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None

    def forward(self, hidden_Nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logits (N, E), gates (N, k), expert indices (N, k)), as the routers of transformers do."""
        logits_NE = nn.functional.linear(hidden_Nd, self.weight, self.bias)
        gates_Nk, chosen_Nk = top_k_gates(logits_NE, self.top_k, normalized=self.normalized)
        return logits_NE, gates_Nk.to(hidden_Nd.dtype), chosen_Nk


class MixtureFeedForward(nn.Module):
    """MoE layer: each token passes through the experts that the router selects."""

    def __init__(self, experts: list[nn.Module], router: TopKRouter) -> None:
        super().__init__()
        require_plain(experts[0])
        self.experts = nn.ModuleList(experts)
        self.router = router

    def forward(self, hidden_BTd: Tensor) -> Tensor:
        hidden_Nd = hidden_BTd.reshape(-1, hidden_BTd.shape[-1])
        _, gates_Nk, chosen_Nk = self.router(hidden_Nd)
        return combine_experts(list(self.experts), hidden_Nd, gates_Nk, chosen_Nk).view_as(hidden_BTd)


class MixtureForCausalLM(PreTrainedModel, GenerationMixin):
    """Dense decoder whose feed-forward networks are mixtures of experts."""

    config_class = MixtureConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        dense = config.dense()
        require_replaceable(dense.model_type)
        # sdpa is the default here, but not every family supports it
        if config._attn_implementation not in (None, "sdpa"):
            dense._attn_implementation = config._attn_implementation
        dense.dtype = None  # use the dtype that this model is loaded in
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
        """Initialise nothing: all weights are loaded."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: for custom code, transformers leaves buffers of modules without parameters uninitialised."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        return cast("nn.Module", self.network.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.network.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.network.set_output_embeddings(new_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return cast("nn.Module", self.network.get_output_embeddings())

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the dense model's embeddings and update the vocabulary size in both configurations."""
        resize: Callable[..., nn.Module] = self.network.resize_token_embeddings
        embedding = resize(*args, **kwargs)
        self.config.vocab_size = self.config.member["vocab_size"] = self.network.config.vocab_size
        return embedding

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
        """Return the dense model's output; transformers looks up these arguments by name in the signature."""
        named = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
        }
        # pass only the arguments in use, since not every family accepts all of them
        arguments = {name: value for name, value in named.items() if value is not None}
        return self.network(input_ids=input_ids, **arguments, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the dense model's own masks, positions and caches; bypasses `forward` and its hooks."""
        self.network.generation_config = self.generation_config
        return cast("PreTrainedModel", self.network).generate(*args, **kwargs)
