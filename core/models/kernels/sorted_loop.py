"""Mixture-of-experts forward pass that runs the experts in sequence, each on the tokens routed to it.

Shapes: N = tokens, k = experts per token, S = N k rows sorted by expert, d = width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .sorted_rows import gated_sum
from .swiglu_experts import gated_experts, swiglu_experts
from .top_k_gates import choose_before_softmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "expertctl_sorted_loop"
"""Name of this kernel for transformers' `experts_implementation`."""


def combine_experts(
    experts: Sequence[Callable[[Tensor], Tensor]], hidden_Nd: Tensor, gates_Nk: Tensor, chosen_Nk: Tensor
) -> Tensor:
    """Return the gated sum of each token's experts, (N, d); each expert with tokens runs once, on all of them."""

    def run(sorted_Sd: Tensor, counts: list[int]) -> Tensor:
        pairs = zip(experts, torch.split(sorted_Sd, counts), strict=True)
        outputs = [expert(rows) for expert, rows in pairs if len(rows)]
        return torch.cat(outputs) if outputs else sorted_Sd

    return gated_sum(run, len(experts), hidden_Nd, gates_Nk, chosen_Nk)


def fused_experts(module: Any, hidden_Nd: Tensor, chosen_Nk: Tensor, gates_Nk: Tensor) -> Tensor:
    """Run the experts of a transformers module, whose weights are fused into two tensors; result as `combine_experts`.

    Falls back to transformers' grouped kernel for other devices, compilation, other layouts, mixed precision, and
    gradients through an activation other than SiLU.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    if not _is_supported(module, hidden_Nd):
        return cast(Tensor, grouped(module, hidden_Nd, chosen_Nk, gates_Nk))
    weights = module.gate_up_proj, module.down_proj
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_Nd, *weights))
    is_silu = type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
    if needs_grad and not is_silu:
        return cast(Tensor, grouped(module, hidden_Nd, chosen_Nk, gates_Nk))

    def run(sorted_Sd: Tensor, counts: list[int]) -> Tensor:
        if needs_grad:
            return swiglu_experts(sorted_Sd, counts, *weights)
        activation = partial(nn.functional.silu, inplace=True) if is_silu else module.act_fn
        return gated_experts(sorted_Sd, counts, *weights, activation)

    return gated_sum(run, len(module.down_proj), hidden_Nd, gates_Nk.to(hidden_Nd.dtype), chosen_Nk)


def _is_supported(module: Any, hidden_Nd: Tensor) -> bool:
    return (
        hidden_Nd.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _is_standard_layout(module)  # other layouts may have no `gate_up_proj`
        and hidden_Nd.dtype == module.gate_up_proj.dtype
    )


def _is_standard_layout(module: Any) -> bool:
    """Return whether experts compute `down(act_fn(gate(x)) * up(x))` with the default weight layout."""
    from transformers.integrations.moe import _default_apply_gate

    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return False
    deviations = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    return module.has_gate and module.is_concatenated and not any(getattr(module, name) for name in deviations)


def use_sorted_loop(model: PreTrainedModel) -> None:
    """Make a model's experts use this kernel on a CPU, where it is faster (`examples/benchmarks/mixture.py`)."""
    any_supported = False
    for module in model.modules():
        choose_before_softmax(module)
        experts: Any = getattr(module, "experts", None)
        if isinstance(experts, nn.ModuleList) and hasattr(module, "router"):
            for part in experts.modules():
                if isinstance(part, nn.Linear):
                    lay_out_for_few_rows(part.weight)
        elif isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter) and _is_standard_layout(experts):
            any_supported = True
            lay_out_for_few_rows(experts.gate_up_proj)
            lay_out_for_few_rows(experts.down_proj)
    if any_supported and model._can_set_experts_implementation():
        register_sorted_loop()
        model.set_experts_implementation(NAME)


def register_sorted_loop() -> None:
    """Register this kernel with transformers; a model unpickled in another process looks it up by name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, fused_experts)


def lay_out_for_few_rows(weight: Tensor) -> None:
    """Store a weight (..., out, in) with more outputs than inputs as column-major; shape and values are unchanged.

    With a few hundred rows of x, `x @ weight.T` otherwise spends a sixth of its time transposing the weight. An
    expert's second weight gains nothing and its gradients get slower; with AVX-512 all weights do (`docs/log.md`).
    Dtypes other than float32 are multiplied by another library, which rearranges them itself.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return
    if weight.dtype == torch.float32 and weight.shape[-2] > weight.shape[-1]:
        weight.data = weight.data.mT.contiguous().mT
