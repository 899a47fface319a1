"""A mixture's experts run one after the other, each on the tokens that were sent to it.

Shapes: N = tokens, k = experts of a token, S = N k rows sorted by expert, d = width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .sorted_rows import gated_sum
from .swiglu_experts import swiglu_experts

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
    """Return the gated sum of each token's experts, (N, d); an expert runs once, on all of its tokens, if it has any."""

    def run(sorted_Sd: Tensor, counts: list[int]) -> Tensor:
        shares = zip(experts, torch.split(sorted_Sd, counts), strict=True)
        done = [expert(share) for expert, share in shares if len(share)]
        return torch.cat(done) if done else sorted_Sd

    return gated_sum(run, len(experts), hidden_Nd, gates_Nk, chosen_Nk)


def fused_experts(module: Any, hidden_Nd: Tensor, chosen_Nk: Tensor, gates_Nk: Tensor) -> Tensor:
    """Run the experts of one of transformers' classes, which keep all of a layer in two tensors; as `mixed`.

    What this is not made for goes to transformers' grouped kernel: other devices, compiling, other layouts, and
    training experts in mixed precision or with another activation than SiLU.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    trains = torch.is_grad_enabled() and (module.gate_up_proj.requires_grad or module.down_proj.requires_grad)
    ours = _is_plain(module) and (not trains or _trains_here(module, hidden_Nd))
    if not ours or hidden_Nd.device.type != "cpu" or torch.compiler.is_compiling():
        found: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_Nd, chosen_Nk, gates_Nk)
        return found
    gates_Nk = gates_Nk.to(hidden_Nd.dtype)
    if trains:
        run = partial(swiglu_experts, gate_up=module.gate_up_proj, down=module.down_proj)
        return gated_sum(run, len(module.down_proj), hidden_Nd, gates_Nk, chosen_Nk)
    gates, ups = module.gate_up_proj.chunk(2, dim=1)
    each = zip(gates.unbind(), ups.unbind(), module.down_proj.unbind(), strict=True)
    linear = nn.functional.linear

    def expert(gate: Tensor, up: Tensor, down: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda hidden: linear(module.act_fn(linear(hidden, gate)) * linear(hidden, up), down)

    return mixed([expert(*three) for three in each], hidden_Nd, gates_Nk, chosen_Nk)


def _is_plain(module: Any) -> bool:
    """Tell whether an expert is `down(act_fn(gate(x)) * up(x))` and stored in the usual order."""
    from transformers.integrations.moe import _default_apply_gate

    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return False
    others = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    return module.has_gate and module.is_concatenated and not any(getattr(module, name) for name in others)


def _trains_here(module: Any, hidden_Nd: Tensor) -> bool:
    one_type = hidden_Nd.dtype == module.gate_up_proj.dtype and not torch.is_autocast_enabled("cpu")
    return one_type and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


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
    """Store a weight, (..., out, in), that has more outputs than inputs with `out` innermost; shape and values stay.

    With a few hundred rows of x, `x @ weight.T` spends a sixth of its time on turning the weight over where it lies
    the other way. The second weight of an expert gains nothing, and its gradients lose (`docs/log.md`). Other numbers
    than float32 are multiplied by another library, which arranges them itself.
    """
    if weight.dtype == torch.float32 and weight.shape[-2] > weight.shape[-1]:
        weight.data = weight.data.mT.contiguous().mT
