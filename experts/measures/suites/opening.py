"""Models that answer questions: checked before any work, then opened one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ....core.errors import UserError
from ....core.models.adapters.prompts import num_prompt_tokens
from ....core.models.decoding.opening import CheckedDecoder, DecoderChoice, OpenedDecoder, check_decoder
from ....core.models.kernels.quantised_linear import require_quantisation
from ....core.models.loading import (
    load_network,
    require_intact_models,
    require_members,
    text_positions,
    tokenizer_folder,
)
from ....core.models.scoring import begin_text, learns_from_text
from ....core.process.compute import best_device
from ....core.process.placement import DeviceMap
from ....core.reporting import SILENT, Reporter
from ....core.text.tokenizer import TextEncoder, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSettings:
    """How the models are loaded, and what changes their distribution."""

    device_map: DeviceMap | None = None
    quantise: str | None = None
    decoder: DecoderChoice | None = None


DEFAULT_SETTINGS = ModelSettings()


@dataclass(frozen=True)
class CheckedModels:
    """Models by name, which are intact and fit the settings."""

    folders: Mapping[str, Path]
    settings: ModelSettings
    decoder: CheckedDecoder | None

    @classmethod
    def of(cls, folders: Mapping[str, Path], settings: ModelSettings, *, scored: bool) -> CheckedModels:
        """Check models; raises `UserError` for a damaged one, and for settings that do not fit.

        With `scored`, the decoder has to be one that text can be scored with.
        """
        decoder = None if settings.decoder is None else check_decoder(settings.decoder)
        for folder in folders.values():
            if decoder is not None:
                if scored:
                    decoder.require_scores()
                decoder.require_for(folder)
            if settings.device_map is not None:
                require_members(folder, settings.device_map)
        if settings.quantise is not None:
            require_quantisation(settings.quantise)
        require_intact_models(folders.values())
        return cls(folders, settings, decoder)

    def encoder(self, name: str) -> TextEncoder:
        """Return the tokenizer of a model, which reads no special tokens from text."""
        return TextEncoder.of_folder(tokenizer_folder(self.folders[name]))

    def require_positions(self, name: str, num_tokens: int, where: str, remedy: str) -> None:
        """Raise `UserError` for a text that is longer than a model reads; `remedy` says what to give fewer of."""
        _require_positions(name, self.folders[name], text_positions(self.folders[name]), num_tokens, where, remedy)

    def open(self, name: str, reporter: Reporter = SILENT) -> OpenedModel:
        """Load a model in float32, with the decoder's distribution if there is one."""
        folder, settings = self.folders[name], self.settings
        network = load_network(folder, dtype="float32", device_map=settings.device_map, quantise=settings.quantise)
        if settings.device_map is None:
            network.to(best_device())
        begin_text(network)
        tokenizer = load_tokenizer(tokenizer_folder(folder))
        decoder = self.decoder
        opened = (
            OpenedDecoder(network)
            if decoder is None
            else decoder.open(network, tokenizer, dtype="float32", reporter=reporter)
        )
        return OpenedModel(name, folder, network, opened, tokenizer)

    def opened(self, reporter: Reporter = SILENT) -> Iterator[OpenedModel]:
        """Yield the models in order, with one in memory at a time."""
        for name in self.folders:
            yield self.open(name, reporter)


@dataclass(frozen=True)
class OpenedModel:
    """One model in memory."""

    name: str
    folder: Path
    network: PreTrainedModel
    """The model without the decoder."""
    decoder: OpenedDecoder
    tokenizer: PreTrainedTokenizerBase

    @property
    def model(self) -> PreTrainedModel:
        """The model whose distribution counts: that of the decoder, or else its own."""
        return self.decoder.model

    @cached_property
    def positions(self) -> int:
        """How many tokens of a text the model reads, and the decoder with it."""
        from ....core.models.decoding.wrapped import positions_of

        return min(positions_of(self.model), text_positions(self.folder))

    def forget(self) -> None:
        """Let a model whose weights depend on earlier texts forget them."""
        begin_text(self.network)

    @property
    def learns_from_text(self) -> bool:
        """Whether a text changes how later ones are scored, unless the model forgets it."""
        return learns_from_text(self.network)

    def require_positions(self, num_tokens: int, where: str, remedy: str) -> None:
        """Raise `UserError` for a text that is longer than the model reads with its decoder."""
        _require_positions(self.name, self.folder, self.positions, num_tokens, where, remedy)


def _require_positions(name: str, folder: Path, positions: int, num_tokens: int, where: str, remedy: str) -> None:
    if num_tokens > positions:
        own = num_prompt_tokens(folder)
        left = f" that its own prompt of {own} leaves" if own else ""
        raise UserError(
            f"{where}: {num_tokens} tokens with the answer, and {name} has {positions} positions{left}; "
            f"give fewer {remedy}, or take the question out"
        )
