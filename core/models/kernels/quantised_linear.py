"""Models with the weights of their linear layers in 8 or 4 bits, by bitsandbytes.

`int8` is LLM.int8 (arXiv:2208.07339), for inference. `nf4` is the 4-bit code of QLoRA (arXiv:2305.14314, section 3), through which
the gradient of a layer's input passes, so that adapters train beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import UserError, unknown_name

if TYPE_CHECKING:
    from torch import nn

OUTLIER = 6.0
"""Size of an activation whose column is multiplied in full precision, as in the paper."""


def require_quantisation(name: str) -> None:
    """Raise `UserError` for an unknown quantisation, and where bitsandbytes cannot be imported."""
    if name not in QUANTISATIONS:
        raise unknown_name("quantisation", name, QUANTISATIONS)
    try:
        import bitsandbytes  # noqa: F401  # whether it loads its binary, too
    except Exception as error:  # a missing library of the system is a RuntimeError or OSError
        raise UserError(
            f'weights in few bits need bitsandbytes ({error}); install it with: pip install "expertctl[bitsandbytes]"'
        ) from None


def quantise(model: nn.Module, how: str) -> int:
    """Replace the linear layers of a model by quantised ones; return their number.

    Output layers stay as they are, and so do experts whose matrices are in one tensor. Raises `UserError` if there is no layer to
    replace.
    """
    import torch

    heads = {id(head) for member in model.modules() if (head := _head(member)) is not None}
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is torch.nn.Linear and id(layer) not in heads
    }
    if not layers:
        raise UserError(
            "this model has no linear layer whose weights can be kept in few bits; load it without quantise"
        )
    for name, layer in layers.items():
        model.set_submodule(name, QUANTISATIONS[how](layer))
    return len(layers)


def _head(member: nn.Module) -> nn.Module | None:
    """Return the output layer of a language model inside a model."""
    find = getattr(member, "get_output_embeddings", None)
    head: nn.Module | None = find() if find is not None else None
    return head


def _int8(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

    small: Any = Linear8bitLt(  # not annotated
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        has_fp16_weights=False,
        threshold=OUTLIER,
        device="meta",
    )
    small.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return _placed(small, layer)


def _nf4(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    small: Any = Linear4bit(  # type: ignore[no-untyped-call]
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    # bitsandbytes' layout for CPUs with AVX-512 fails for rows that are no whole blocks, and computes in bfloat16
    small.support_avx512bf16_for_cpu = False
    small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)
    return _placed(small, layer)


def _placed(small: Any, layer: nn.Linear) -> nn.Module:
    """Return a layer with another one's bias, on its device, which is what quantises the weights."""
    small.bias = layer.bias
    placed: nn.Module = small.to(layer.weight.device)
    return placed


QUANTISATIONS = {"int8": _int8, "nf4": _nf4}
