"""A mixture's experts run one after the other, each on the tokens that were sent to it.

Shapes: N = tokens, k = experts of a token, d = width, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "expertctl_sorted_loop"
"""What transformers' `experts_implementation` calls it."""


def mixed(
    experts: Sequence[Callable[[Tensor], Tensor]],
    hidden_Nd: Tensor,
    gates_Nk: Tensor,
    chosen_Nk: Tensor,
) -> Tensor:
    """Return the gated sum of each token's experts, (N, d); tokens are sorted by expert, each of which runs once."""
    order = chosen_Nk.flatten().argsort(stable=True)
    counts = torch.bincount(chosen_Nk.flatten(), minlength=len(experts)).tolist()
    tokens = order // chosen_Nk.shape[1]
    gates = gates_Nk.flatten()[order, None]
    total_Nd = torch.zeros_like(hidden_Nd)
    begin = 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            mine = slice(begin, begin + count)
            total_Nd.index_add_(0, tokens[mine], expert(hidden_Nd[tokens[mine]]) * gates[mine])
        begin += count
    return total_Nd


def fused_experts(module: Any, hidden_Nd: Tensor, chosen_Nk: Tensor, gates_Nk: Tensor) -> Tensor:
    """Run the experts of one of transformers' classes, which keep all of a layer in two tensors; as `mixed`.

    What this is not made for goes to transformers' grouped kernel: other devices, compiling, other layouts, and
    training the experts, where putting the gradients of all slices together costs more than the loop saves.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    trains = torch.is_grad_enabled() and module.gate_up_proj.requires_grad
    if trains or hidden_Nd.device.type != "cpu" or torch.compiler.is_compiling() or not _is_plain(module):
        found: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_Nd, chosen_Nk, gates_Nk)
        return found
    gates, ups = module.gate_up_proj.chunk(2, dim=1)
    weights = zip(gates.unbind(), ups.unbind(), module.down_proj.unbind(), strict=True)
    linear = nn.functional.linear

    def expert(gate: Tensor, up: Tensor, down: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda hidden: linear(module.act_fn(linear(hidden, gate)) * linear(hidden, up), down)

    return mixed([expert(*three) for three in weights], hidden_Nd, gates_Nk.to(hidden_Nd.dtype), chosen_Nk)


def _is_plain(module: Any) -> bool:
    """Tell whether an expert is `down(act_fn(gate(x)) * up(x))` and stored in the usual order."""
    from transformers.integrations.moe import _default_apply_gate

    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return False
    others = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    return module.has_gate and module.is_concatenated and not any(getattr(module, name) for name in others)


def use_sorted_loop(model: PreTrainedModel) -> None:
    """Make a model's experts run like this on a CPU, wherever it is the faster way (`examples/benchmarks/mixture.py`)."""
    for module in model.modules():
        experts: Any = getattr(module, "experts", None)
        if isinstance(experts, nn.ModuleList) and hasattr(module, "router"):
            for part in experts.modules():
                if isinstance(part, nn.Linear):
                    lay_out_for_few_rows(part.weight)
        elif isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter) and _is_plain(experts):
            lay_out_for_few_rows(experts.gate_up_proj)
            lay_out_for_few_rows(experts.down_proj)
    if not model._can_set_experts_implementation():
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, fused_experts)
    model.set_experts_implementation(NAME)


def lay_out_for_few_rows(weight: Tensor) -> None:
    """Store a weight, (..., out, in), with `out` innermost; its shape and its values stay.

    With a few hundred rows of x, `x @ weight.T` spends a sixth of its time on turning the weight over where it lies
    the other way. Other numbers than float32 are multiplied by another library, which arranges them itself.
    """
    if weight.dtype == torch.float32:
        weight.data = weight.data.mT.contiguous().mT
