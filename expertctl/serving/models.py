"""The models of a server: each with its tokenizer, and an engine for every way of generating in use."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertctl.core.errors import UserError, first_line, unknown_name
from expertctl.core.manifests.manifest import find_manifest
from expertctl.core.models.decoding.opening import CheckedDecoder
from expertctl.core.models.loading import load_model, require_intact_models, text_positions, tokenizer_folder
from expertctl.core.models.serving.engine import Engine
from expertctl.core.models.serving.text_stream import decoder_of
from expertctl.core.process.compute import best_device
from expertctl.core.process.placement import DeviceMap
from expertctl.core.text.rendering import resolved_template
from expertctl.core.text.tokenizer import missing_row

from .errors import RequestError
from .limits import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


NO_DECODER = "none"
"""What a request names to be answered without the server's decoder."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the models are loaded."""

    device_map: DeviceMap | None = None
    quantise: str | None = None
    chat_template: str | None = None
    """Name or file of a chat template for models that have none, or another one."""
    decoder: CheckedDecoder | None = None
    """Decoder of requests that do not ask for none."""


@dataclass(frozen=True)
class Way:
    """How a model generates for some requests."""

    without: frozenset[str] = frozenset()
    """Disabled experts."""
    plain: bool = False
    """Whether the server's decoder is left out."""


class ServedModel:
    """A model by its name; raises `UserError` if its folder cannot be served."""

    def __init__(self, name: str, folder: Path, limits: Limits, loading: Loading = Loading()) -> None:
        require_intact_models([folder])
        if loading.decoder is not None:
            loading.decoder.require_for(folder)
        self.name, self._folder, self._limits, self._loading = name, folder, limits, loading
        self._model, self._tokenizer = self._load(())
        self._tokenizing = threading.Lock()  # tokenizers are not thread-safe
        decoded = self._decoded(self._model, plain=False)
        limit = text_positions(folder)
        self.max_length: int = min(limit, getattr(decoded, "positions", limit))
        """Most tokens of a prompt and its continuation."""
        self.experts = _experts_of(folder, self._model)
        """Names of the experts that requests may disable."""
        self._is_ensemble = hasattr(self._model, "responsibilities")
        self._template = _template_of(folder, loading, self._tokenizer)
        self._variants: OrderedDict[Way, Engine] = OrderedDict()
        self._adding = asyncio.Lock()
        self._variants[self._way((), None)] = self._new_engine(self._model, decoded)

    def _load(self, without: Collection[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        device_map, quantise = self._loading.device_map, self._loading.quantise
        model, tokenizer = load_model(self._folder, without=without, device_map=device_map, quantise=quantise)
        if device_map is None and quantise is None:
            movable: Any = model
            movable.to(best_device())
        return model, tokenizer

    # --- engines ---

    async def engine(self, without: Collection[str] = (), decoder: str | None = None) -> Engine:
        """Return the engine of the model without some experts, with the server's decoder unless `decoder` is "none".

        Raises `RequestError`.
        """
        wanted = self._way(without, decoder)
        if wanted not in self._variants:
            async with self._adding:
                if wanted not in self._variants:
                    self._make_room()
                    self._variants[wanted] = await asyncio.to_thread(self._variant, wanted)
        self._variants.move_to_end(wanted)
        return self._variants[wanted]

    def has_shares(self, decoder: str | None = None) -> bool:
        """Return whether the model mixes the experts' predictions per token, as it generates with `decoder`."""
        return self._is_ensemble and (self._loading.decoder is None or decoder == NO_DECODER)

    def _way(self, without: Collection[str], decoder: str | None) -> Way:
        for name in sorted(without):
            if name not in self.experts:
                raise RequestError(400, str(unknown_name("expert", name, self.experts)), param="without")
        used = self._loading.decoder
        if decoder not in (None, NO_DECODER, used and used.decoder.name):
            started = f"decoder '{used.decoder.name}'" if used is not None else "no decoder"
            raise RequestError(400, f"the server was started with {started}, not with '{decoder}'", param="decoder")
        return Way(frozenset(without), plain=used is None or decoder == NO_DECODER)

    def _variant(self, way: Way) -> Engine:
        if way.without and len(way.without) == len(self.experts):
            raise RequestError(400, "no expert is left; keep at least one", param="without")
        try:
            model: Any = self._model
            if way.without and self._is_ensemble:  # its members are shared, nothing is loaded
                model = model.without(way.without).eval()
            elif way.without:
                model = self._load(way.without)[0]
            return self._new_engine(model, self._decoded(model, plain=way.plain))
        except UserError as error:
            raise RequestError(400, str(error), param="without") from None

    def _make_room(self) -> None:
        """Stop the engine whose last request is the longest ago; raises `RequestError` if all are busy."""
        if len(self._variants) < self._limits.variants:
            return
        usual = self._way((), None)
        idle = next((way for way, engine in self._variants.items() if way != usual and engine.is_idle), None)
        if idle is None:
            raise RequestError(429, "too many different sets of experts are in use; try again later")
        self._variants.pop(idle).stop()

    def _decoded(self, model: PreTrainedModel, *, plain: bool) -> PreTrainedModel:
        decoder = self._loading.decoder
        return model if plain or decoder is None else decoder.open(model, self._tokenizer).model

    def _new_engine(self, model: PreTrainedModel, decoded: PreTrainedModel) -> Engine:
        return Engine(
            decoded,
            decoder_of(self._tokenizer),
            end_tokens=_end_tokens(model, self._tokenizer),
            expert_names=getattr(model, "expert_names", ()) if decoded is model else (),
            max_rows=self._limits.rows,
            max_waiting=self._limits.waiting,
        )

    @property
    def engines(self) -> Sequence[Engine]:
        """All engines of the model."""
        return tuple(self._variants.values())

    # --- text and tokens ---

    @property
    def has_template(self) -> bool:
        """Whether the model takes conversations."""
        return self._template is not None

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Return the tokens of a prompt, at least one; raises `RequestError` for tokens that the model does not have."""
        if not isinstance(prompt, str):
            return self._checked(prompt)
        with self._tokenizing:
            ids = self._tokenizer(prompt)["input_ids"]
        return self._checked(ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Return the tokens of a conversation up to the answer; raises `RequestError` if the template refuses it."""
        if self._template is None:
            raise RequestError(
                400,
                f"model '{self.name}' has no chat template; use /v1/completions, or start the server with --chat-template",
                param="messages",
            )
        with self._tokenizing:
            try:
                text = self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    chat_template=self._template,
                    add_generation_prompt=True,
                    tokenize=False,
                )
            except Exception as error:  # whatever the template raises
                raise RequestError(
                    400, f"the chat template refuses the messages: {first_line(error)}", param="messages"
                ) from None
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._checked(ids)

    def token_text(self, token: int) -> str:
        """Return the text of a token alone, with the name of a special one."""
        with self._tokenizing:
            return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        tokenizer: Any = self._tokenizer
        if not ids:
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            if first is None:
                raise RequestError(400, "the tokenizer has no begin-of-sequence token; give a prompt", param="prompt")
            ids = [first]
        rows = getattr(self._model.config.get_text_config(), "vocab_size", None)
        if min(ids) < 0 or (rows is not None and max(ids) >= rows):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            text = tokenizer.convert_ids_to_tokens(wrong) if 0 <= wrong < len(tokenizer) else None
            raise RequestError(400, str(missing_row(text, wrong, rows or len(tokenizer))), param="prompt")
        return tuple(ids)


def _experts_of(folder: Path, model: PreTrainedModel) -> tuple[str, ...]:
    manifest = find_manifest(folder)
    merged = manifest.merged if manifest is not None else None
    own = getattr(model, "expert_names", None)
    if own is not None:
        return tuple(own)
    return tuple(merged.experts) if merged is not None and merged.mixture is not None else ()


def _template_of(folder: Path, loading: Loading, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if loading.chat_template is not None:
        return resolved_template(loading.chat_template, tokenizer_folder(folder), Path.cwd())
    try:
        template: str | None = tokenizer.get_chat_template() if tokenizer.chat_template else None
    except ValueError:  # several, none of which is the default
        return None
    return template


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    stated = getattr(model.generation_config, "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [stated]
    return {int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None}
