"""Sampling text from any artefact, and which expert of a generalist carried each token.

Shapes: B = 1, T = tokens, K = experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..process.compute import best_device
from .loading import load_model, require_intact_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GeneratedToken:
    """One token of prompt or continuation."""

    id: int
    text: str
    """What it adds to the text; empty for all but the last token of a character that several make up."""
    shares: Mapping[str, float] | None
    """p(expert carried it), summing to 1; None where nobody predicted it (the first) or nobody asked."""


@dataclass(frozen=True)
class Generation:
    """A prompt and its continuation."""

    prompt: tuple[GeneratedToken, ...]
    continuation: tuple[GeneratedToken, ...]
    experts: tuple[str, ...]
    """Names of the experts that shares speak of; empty when nobody asked."""

    @property
    def text(self) -> str:
        """The continuation."""
        return "".join(token.text for token in self.continuation)


def generate(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 0,
    without: Collection[str] = (),
    shares: bool = False,
    tell: Callable[[int], None] = lambda tokens: None,
) -> Generation:
    """Sample a continuation of `prompt`; temperature 0 takes the most probable token each time.

    `tell` hears how many tokens there are so far. Raises `UserError` for a model without experts when
    `shares` are asked for, and for a prompt that leaves no room.
    """
    import torch

    require_intact_model(folder)
    model, tokenizer = load_model(folder, without=without)
    if shares and not hasattr(model, "responsibilities"):
        raise UserError(
            f"{folder.name} does not mix experts token by token, so no token has an expert; ask an ensemble"
        )
    model.to(best_device())
    prompt_1T = _prompt_tokens(model, tokenizer, prompt, max_new_tokens).to(model.device)
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    with torch.inference_mode():
        text_1T = model.generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            streamer=_Teller(tell),
            **sampling,
        )
        carried = _shares(model, text_1T) if shares else None
    ids = text_1T[0].tolist()
    tokens = [
        GeneratedToken(token, text, carried[index] if carried else None)
        for index, (token, text) in enumerate(zip(ids, _pieces(tokenizer, ids), strict=True))
    ]
    cut = prompt_1T.shape[1]
    names = tuple(model.expert_names) if shares else ()
    return Generation(tuple(tokens[:cut]), tuple(tokens[cut:]), names)


class _Teller:
    """What `generate` hands each new token to."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._count = -1  # the prompt comes first

    def put(self, tokens: Tensor) -> None:
        self._count += 1
        self._tell(self._count)

    def end(self) -> None: ...


def _prompt_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> Tensor:
    """Return the prompt as tokens (1, T); an empty one is the token that stands before a document."""
    import torch

    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise UserError("this model's tokenizer has no token to begin a text with; give a prompt")
        ids = [first]
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and len(ids) + max_new_tokens > room:
        raise UserError(
            f"the prompt's {len(ids)} tokens and {max_new_tokens} new ones are more than the model's {room} positions; "
            "shorten one of them"
        )
    return torch.tensor([ids])


def _shares(model: Any, text_1T: Tensor) -> list[Mapping[str, float] | None]:
    """Return what each expert's part in each token is; the first token was predicted by nobody."""
    if text_1T.shape[1] < 2:
        return [None]
    rows = model.responsibilities(text_1T)[0].tolist()
    return [None, *(dict(zip(model.expert_names, row, strict=True)) for row in rows)]


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return what each token adds to the text; a character of several tokens comes with its last."""
    pieces: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if text.endswith("�") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        before = text
    return pieces
