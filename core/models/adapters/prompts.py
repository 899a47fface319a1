"""Prompts as experts (prompt tuning, arXiv:2104.08691): trained rows that a frozen model reads before every text.

A folder of PEFT (`PROMPT_TUNING`) holds the rows. The rows take positions of the model's context, and the text's positions
follow them. Shapes: B = batch, P = rows of the prompt, T = tokens of the text, D = width of the embedding.
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ...artefacts.files import read_json
from ...artefacts.safetensors_io import Checkpoint
from ...errors import UserError
from .folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

PROMPT_TYPE = "PROMPT_TUNING"
PROMPT_TENSOR = "prompt_embeddings"
"""Name of the prompt, (P, D), in PEFT's files."""
_MODULE = "prompt"
"""Name of the prompt's module in a model."""
_ARGUMENTS = ("inputs_embeds", "attention_mask", "past_key_values", "logits_to_keep")


def is_prompt(folder: Path) -> bool:
    """Return whether a folder holds a prompt, which changes no tensor of the model."""
    return is_adapter(folder) and read_json(folder / ADAPTER_CONFIG).get("peft_type") == PROMPT_TYPE


def num_prompt_tokens(folder: Path) -> int:
    """Return how many positions of the context the prompt in a folder takes, 0 for other artefacts."""
    return int(read_json(folder / ADAPTER_CONFIG)["num_virtual_tokens"]) if is_prompt(folder) else 0


def refuse_prompt(folder: Path, what: str) -> None:
    """Raise `UserError` if a folder holds a prompt; `what` says what needs tensors, such as `merge method 'ties'`."""
    if is_prompt(folder):
        raise UserError(
            f"{folder} is a prompt, which changes no tensor of the seed, so {what} has nothing to work on; combine prompts by "
            "--method ensemble, or train the next one with --trains progressive_prompts"
        )


def read_prompt(folder: Path) -> Tensor:
    """Return the prompt in a folder, (P, D), in its stored dtype; raises `UserError` for another kind of file."""
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}; save the prompt again with safe_serialization=True")
    file, tokens = Checkpoint([weights]), num_prompt_tokens(folder)
    if list(file) != [PROMPT_TENSOR] or len(file.entry(PROMPT_TENSOR).shape) != 2:
        raise UserError(f"{weights} is not a prompt of PEFT, which is one matrix '{PROMPT_TENSOR}'")
    if file.entry(PROMPT_TENSOR).shape[0] != tokens:
        raise UserError(
            f"{weights} has a prompt of {file.entry(PROMPT_TENSOR).shape[0]} rows, and {ADAPTER_CONFIG} says {tokens}"
        )
    return file.read(PROMPT_TENSOR)


def fixed_prompt(rows_PD: Tensor) -> nn.Module:
    """Return a prompt that is not trained, for `with_prompt`."""
    from torch.nn import Embedding

    prompt: nn.Module = Embedding.from_pretrained(rows_PD)  # type: ignore[no-untyped-call]  # not annotated in torch
    return prompt


def require_promptable(model: PreTrainedModel) -> None:
    """Raise `UserError` for a class of models that cannot read a prompt before a text."""
    from torch.nn import Embedding

    taken = signature(model.forward).parameters
    missing = [name for name in _ARGUMENTS if name not in taken]
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embedding = None
    if missing or not isinstance(embedding, Embedding):
        reason = f"takes no {missing[0]}" if missing else "gives no access to its input embedding"
        raise UserError(
            f"{type(model).__name__} {reason}, which a prompt needs; train another part, such as --trains lora"
        )


def with_prompt(model: PreTrainedModel, prompt: nn.Module) -> PreTrainedModel:
    """Let a model read a prompt before every text, in place; its logits are those of the text's tokens alone.

    `prompt` maps indices (B, P) to rows (B, P, D); `num_embeddings` is P. Raises `UserError` for a model that cannot.
    """
    require_promptable(model)
    assert prompt_of(model) is None, "a model reads one prompt"
    width = embedding_width(model)
    rows_PD = getattr(prompt, "weight", None)
    if rows_PD is not None and rows_PD.shape[1] != width:
        raise UserError(f"the prompt is of width {rows_PD.shape[1]}, and the model's embedding of {width}")
    parts: list[Any] = [*prompt.modules(), *prompt.parameters()]
    for part in parts:
        part._is_hf_initialized = True  # a model that contains this one would draw them anew
    setattr(model, _MODULE, prompt)
    model.register_forward_pre_hook(_read_prompt_first, with_kwargs=True)
    model.save_pretrained = _refuse_saving  # it would write a model that lacks the prompt
    return model


def embedding_width(model: PreTrainedModel) -> int:
    """Return the width D of a model's input embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[1])


def prompt_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the prompt that a model reads first; None if it has none."""
    prompt: nn.Module | None = getattr(model, _MODULE, None)
    return prompt


def prompt_tokens_of(model: PreTrainedModel) -> int:
    """Return how many positions of the context a model's prompt takes."""
    prompt: Any = prompt_of(model)
    return 0 if prompt is None else int(prompt.num_embeddings)


def prompt_rows(prompt: nn.Module, batch: int, device: Any) -> Tensor:
    """Return a prompt's rows for each text of a batch, (B, P, D)."""
    import torch

    count: Any = prompt.num_embeddings
    rows: Tensor = prompt(torch.arange(count, device=device).expand(batch, -1))
    return rows


def _read_prompt_first(
    model: Any, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """A forward pre-hook: put the prompt before the embedded text, unless the cache has it already."""
    if arguments:
        named = dict(zip(signature(model.forward).parameters, arguments, strict=False)) | named
    count, cache, mask_BT = prompt_tokens_of(model), named.get("past_key_values"), named.get("attention_mask")
    text_BTD: Any = named.get("inputs_embeds")
    ids_BT: Any = named.get("input_ids")
    batch, length = (ids_BT if text_BTD is None else text_BTD).shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    if mask_BT is not None:
        read = max(past - count, 0) + length
        if not hasattr(mask_BT, "dim") or mask_BT.dim() != 2 or mask_BT.shape[1] != read:
            raise _not_continued(f"its attention mask is not of shape (texts, {read})")
        named["attention_mask"] = _cat(mask_BT.new_ones(batch, count), mask_BT)
    positions_BT = named.get("position_ids")
    if positions_BT is not None:
        named["position_ids"] = positions_BT = positions_BT + count
    if past:  # `generate` would continue behind a text whose length is that of the cache
        if mask_BT is None and positions_BT is not None and int(positions_BT.max()) != past + length - 1:
            raise _not_continued(f"its positions do not follow the {past} in the cache")
        return (), named
    if text_BTD is None:
        text_BTD = model.get_input_embeddings()(ids_BT)
    rows_BPD = prompt_rows(model.get_submodule(_MODULE), batch, text_BTD.device).to(text_BTD.dtype)
    named |= {"input_ids": None, "inputs_embeds": _cat(rows_BPD, text_BTD)}
    if positions_BT is not None:
        before_BP = positions_BT.new_ones(len(positions_BT), count).cumsum(dim=1) - 1
        named["position_ids"] = _cat(before_BP, positions_BT)
    kept: Any = named.get("logits_to_keep")
    named["logits_to_keep"] = kept + count if hasattr(kept, "dim") else kept or length
    return (), named


def _not_continued(reason: str) -> UserError:
    return UserError(
        f"a model with a prompt cannot read this text: {reason}; generate with the default cache, from the begin of the text"
    )


def _cat(before: Tensor, after: Tensor) -> Tensor:
    import torch

    return torch.cat((before, after), dim=1)


def _refuse_saving(*arguments: Any, **named: Any) -> NoReturn:
    raise UserError(
        "a model with a prompt is not saved as a model, which would lack the prompt; copy its expert's folder"
    )
