"""From the name and options of a decoder to the model that generates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artefacts.digests import digest_of_tokenizer
from ...errors import UserError, unknown_name
from ...hooks.evaluation import Decoder, DecoderInputs, SampleChoice
from ...hooks.manager import installed_plugins
from ...hooks.options import parse_options
from ...reporting import SILENT, Reporter
from ...text.tokenizer import load_tokenizer
from ..loading import load_network, require_intact_models, tokenizer_folder
from ..scoring import begin_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class DecoderChoice:
    """A decoder as users name it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    artefact: Callable[[str], Path] = Path
    """Returns the folder of a model that an option names, such as `Layout.artefact`."""
    root: Path = Path()
    """The workspace's root, where other folders are."""


@dataclass(frozen=True)
class CheckedDecoder:
    """A decoder, its options, and the folders of the other models that it needs; no model is loaded yet."""

    decoder: Decoder
    options: Any
    models: Mapping[str, Path]
    folders: Mapping[str, Path] = field(default_factory=dict)
    """Other folders that it reads."""

    def require_for(self, folder: Path) -> None:
        """Raise `UserError` for a model whose tokenizer is not that of the others, and for damaged ones."""
        require_intact_models(self.models.values())
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
        inputs = DecoderInputs(model, tokenizer, others, self.folders, reporter)
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
    """Return a decoder with its options; raises `UserError` for an unknown decoder, option, model or folder."""
    decoder = installed_plugins().offer(Decoder, choice.name)
    options = parse_options(decoder.options, choice.options, f"decoder '{choice.name}'")
    names: Sequence[str] = () if decoder.models is None else decoder.models(options)
    read = () if decoder.folders is None else decoder.folders(options)
    return CheckedDecoder(
        decoder,
        options,
        {name: choice.artefact(name) for name in names},
        {name: _existing(choice.root, name) for name in read},
    )


def _existing(root: Path, name: str) -> Path:
    """Return a folder of a workspace; raises `UserError` that lists those beside it if there is none."""
    folder = root / name
    if folder.is_dir():
        return folder
    known = sorted(path.name for path in folder.parent.glob("[!.]*") if path.is_dir()) if folder.parent.is_dir() else ()
    raise unknown_name("folder", folder.name, known, listed_as=f"{folder.parent} has")


def have_same_tokenizer(folder: Path, other: Path) -> bool:
    """Return whether two models map text to the same tokens: equal files, or equal vocabularies."""
    first, second = tokenizer_folder(folder), tokenizer_folder(other)
    if digest_of_tokenizer(first) == digest_of_tokenizer(second):
        return True
    return bool(load_tokenizer(first).get_vocab() == load_tokenizer(second).get_vocab())
