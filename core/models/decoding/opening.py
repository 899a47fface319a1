"""From the name and options of a decoder to the model that generates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artefacts.digests import digest_of_tokenizer
from ...artefacts.layout import Layout
from ...errors import UserError
from ...hooks.evaluation import Decoder, DecoderInputs, SampleChoice
from ...hooks.manager import installed_plugins
from ...hooks.options import parse_options
from ...reporting import SILENT, Reporter
from ...text.tokenizer import load_tokenizer
from ..loading import load_network, require_intact_models, tokenizer_folder
from ..scoring import begin_text
from .memories.manifest import require_memory_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class DecoderChoice:
    """A decoder as users name it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    artefact: Callable[[str], Path] = Path
    """Returns the folder of a model that an option names, such as `Layout.artefact`."""
    memory: Callable[[str], Path] = Path
    """Returns the folder of a memory that an option names, such as `Layout.memory`."""
    index: Callable[[str], Path] = Path
    """Returns the folder of an index that an option names, such as `Layout.index`."""

    @classmethod
    def of_workspace(cls, name: str, options: Mapping[str, Any] | None, layout: Layout) -> DecoderChoice:
        """Return a decoder whose options name what is in a workspace."""
        return cls(name, options or {}, layout.artefact, layout.memory, layout.index)


@dataclass(frozen=True)
class CheckedDecoder:
    """A decoder, its options, and the folders of the other models that it needs; no model is loaded yet."""

    decoder: Decoder
    options: Any
    models: Mapping[str, Path]
    memories: Mapping[str, Path] = field(default_factory=dict)
    indexes: Mapping[str, Path] = field(default_factory=dict)

    def require_for(self, folder: Path) -> None:
        """Raise `UserError` for a model that has not the others' tokenizer or did not make the memories, and for damage."""
        require_intact_models(self.models.values())
        for memory in self.memories.values():
            require_memory_of(memory, folder)
        for name, other in self.models.items():
            if not have_same_tokenizer(folder, other):
                raise UserError(
                    f"{folder.name} and {name} have different tokenizers; decoder '{self.decoder.name}' needs models that read "
                    "and predict the same tokens"
                )

    def require_scores(self) -> None:
        """Raise `UserError` if text cannot be scored with the decoder."""
        reason = None if self.decoder.unscored is None else self.decoder.unscored(self.options)
        if self.decoder.wrap is None:
            reason = "it chooses among samples and has no distribution of its own"
        if reason is not None:
            raise UserError(f"decoder '{self.decoder.name}' cannot score text: {reason}")

    def open(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str = "auto",
        reporter: Reporter = SILENT,
    ) -> OpenedDecoder:
        """Load the other models to the device of `model` and return what generates."""
        others = {}
        for name, folder in self.models.items():
            others[name] = load_network(folder, dtype=dtype)
            others[name].to(model.device)
            begin_text(others[name])
        inputs = DecoderInputs(model, tokenizer, others, reporter, self.memories, self.indexes)
        wrap, choose = self.decoder.wrap, self.decoder.choose
        return OpenedDecoder(
            model if wrap is None else wrap(inputs, self.options),
            None if choose is None else choose(inputs, self.options),
        )


@dataclass(frozen=True)
class OpenedDecoder:
    """A model that generates, and how to choose among its samples, if several are drawn."""

    model: PreTrainedModel
    samples: SampleChoice | None = None


def check_decoder(choice: DecoderChoice) -> CheckedDecoder:
    """Return a decoder with its options; raises `UserError` for an unknown decoder, option, model, memory or index."""
    decoder = installed_plugins().offer(Decoder, choice.name)
    options = parse_options(decoder.options, choice.options, f"decoder '{choice.name}'")
    names: Sequence[str] = () if decoder.models is None else decoder.models(options)
    memories: Sequence[str] = () if decoder.memories is None else decoder.memories(options)
    indexes: Sequence[str] = () if decoder.indexes is None else decoder.indexes(options)
    return CheckedDecoder(
        decoder,
        options,
        {name: choice.artefact(name) for name in names},
        {name: choice.memory(name) for name in memories},
        {name: choice.index(name) for name in indexes},
    )


def have_same_tokenizer(folder: Path, other: Path) -> bool:
    """Return whether two models map text to the same tokens: equal files, or equal vocabularies."""
    first, second = tokenizer_folder(folder), tokenizer_folder(other)
    if digest_of_tokenizer(first) == digest_of_tokenizer(second):
        return True
    return bool(load_tokenizer(first).get_vocab() == load_tokenizer(second).get_vocab())
