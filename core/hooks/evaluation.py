"""Finished models: evaluators, which score them, decoders, which generate with them, and exporters, which write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..reporting import SILENT, Reporter
from .option_checks import check_options_class

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..text.token_store import TokenWindows, Windows


@dataclass(frozen=True)
class Score:
    """The values of one evaluator for one model on one domain."""

    values: Mapping[str, float]
    """Metric name -> value, such as `{"bits_per_byte": 1.9}`."""
    tokens: int
    """Number of scored tokens."""


@dataclass(frozen=True)
class Metric:
    """One value that an evaluator returns."""

    name: str
    """Key in `Score.values` and in JSON output."""
    title: str
    """Name in tables, such as `bits per byte`."""
    higher_is_better: bool = False

    def best(self, values: Mapping[str, float]) -> str:
        """Return the model with the best value, the first one of equals."""
        return (max if self.higher_is_better else min)(values, key=lambda model: values[model])

    def is_worse(self, value: float, other: float) -> bool:
        """Return whether `value` is worse than `other`."""
        return value < other if self.higher_is_better else value > other


@dataclass(frozen=True)
class Division:
    """How an evaluator scores a text batch by batch, so that several processes can share the batches.

    Batches do not depend on the number of processes, so that the score does not either. All functions belong to a module.
    """

    batch_size: Callable[[PreTrainedModel, TokenWindows], int]
    """`batch_size(model, windows)` is the number of windows in a batch."""
    partial: Callable[[PreTrainedModel, Windows], Any]
    """`partial(model, batch)` measures one batch, without gradients; what it returns can be pickled."""
    merge_scores: Callable[[TokenWindows, Sequence[Any]], Score]
    """`merge_scores(windows, partials)` returns the score of the whole text; `partials` are those of all batches, in order."""

    def partials(
        self, model: PreTrainedModel, windows: TokenWindows, begin: int = 0, end: int | None = None
    ) -> list[Any]:
        """Return what `partial` returns for the batches with numbers `begin` to `end` (None: to the last)."""
        import torch

        with torch.inference_mode():
            batches = windows.batches(self.batch_size(model, windows), begin, end)
            return [self.partial(model, batch) for batch in batches]

    def evaluate(self, model: PreTrainedModel, windows: TokenWindows) -> Score:
        """Return the score of the whole text, in this process."""
        return self.merge_scores(windows, self.partials(model, windows))


@dataclass(frozen=True)
class Evaluator:
    """Scores a model on the test part of a domain."""

    name: str
    summary: str
    metrics: tuple[Metric, ...]
    """The values that it returns; comparisons and gates use the first one."""
    evaluate: Callable[[PreTrainedModel, TokenWindows], Score]
    """`evaluate(model, windows)`; `Score.values` holds a number for every metric."""
    division: Division | None = None
    """How several processes share a text, with `evaluate` as its `evaluate`; None: only one process can score it."""


@dataclass(frozen=True)
class DecoderInputs:
    """The models that a `Decoder` works with, in evaluation mode."""

    model: PreTrainedModel
    """The model that the user named."""
    tokenizer: PreTrainedTokenizerBase
    models: Mapping[str, PreTrainedModel]
    """The models of `Decoder.models`; they have the same tokenizer."""
    reporter: Reporter = SILENT
    """Receives messages for the user."""
    memories: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the memories of `Decoder.memories`; their keys are those of `model`."""
    indexes: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the indexes of `Decoder.indexes`."""


@dataclass(frozen=True)
class SampleChoice:
    """Several samples for each prompt, of which the best is kept."""

    count: int
    """Number of samples for each prompt."""
    score: Callable[[Sequence[int], Sequence[Sequence[int]]], Sequence[float]]
    """`score(prompt, continuations)`, all in tokens; the continuation with the highest score is kept, the first of equals."""


@dataclass(frozen=True)
class Decoder:
    """Changes how the next token comes about when a model generates text."""

    name: str
    summary: str
    wrap: Callable[[DecoderInputs, Any], PreTrainedModel] | None = None
    """`wrap(inputs, options)` returns the model that generates instead: `forward` takes the same arguments, and its `logits` are
    those of the distribution. Raises `UserError` for a model that it cannot work with."""
    choose: Callable[[DecoderInputs, Any], SampleChoice] | None = None
    """`choose(inputs, options)` returns how to choose among samples; without `wrap`, those of the model itself."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    models: Callable[[Any], Sequence[str]] | None = None
    """`models(options)` names the other models that it needs: artefacts or folders."""
    memories: Callable[[Any], Sequence[str]] | None = None
    """`memories(options)` names the memories that it reads; others than those of the user's model are refused."""
    indexes: Callable[[Any], Sequence[str]] | None = None
    """`indexes(options)` names the indexes of text that it searches."""
    unscored: Callable[[Any], str | None] | None = None
    """`unscored(options)` says why text cannot be scored with the wrapped model, None if it can; default: it can."""

    def __post_init__(self) -> None:
        check_options_class(self.options, f"decoder '{self.name}'")
        if self.wrap is None and self.choose is None:
            raise ValueError(f"decoder '{self.name}' has neither wrap nor choose")


class ModelTensors(Protocol):
    """The tensors of a whole model, read one at a time, by the names in published checkpoints of its family."""

    def __iter__(self) -> Iterator[str]:
        """Yield the names, in the order in which reading them is cheapest."""
        ...

    def shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return safetensors' dtype (`F32`, `BF16` ...) and the shape of each tensor, by name."""
        ...

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        ...


@dataclass(frozen=True)
class ExportInputs:
    """The model that an `Exporter` writes: whole, and compared with its manifest before."""

    name: str
    files: Path
    """Folder with `config.json` and the tokenizer; for an expert, its seed's."""
    config: Mapping[str, Any]
    """Content of `config.json`."""
    tensors: ModelTensors
    """All tensors, those of an expert or a LoRA adapter applied; a mixture's experts are separate tensors."""
    fused: ModelTensors
    """The same with the tensors and names that transformers has in memory: experts of a layer in one tensor."""
    is_mixture: bool
    card: str = ""
    """Text of the model card."""
    digest: str | None = None
    """Digest of the artefact; None for a folder without a manifest."""
    licence: str | None = None
    base_models: tuple[str, ...] = ()
    """Names of the models that it was made from."""
    reporter: Reporter = SILENT
    """Receives messages for the user."""


@dataclass(frozen=True)
class Exporter:
    """Writes a model in the layout of other tools."""

    name: str
    summary: str
    export: Callable[[ExportInputs, Any, Path], Sequence[str]]
    """`export(model, options, path)` writes the model and returns notes for the user. `path` is an empty folder, or an
    empty file, with a temporary name; it gets the output's name afterwards. Raises `UserError` for a model that the
    layout cannot express, before it writes."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    output: Literal["folder", "file"] = "folder"

    def __post_init__(self) -> None:
        check_options_class(self.options, f"exporter '{self.name}'")
