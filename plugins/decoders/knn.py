"""kNN-LM: the tokens behind the nearest keys of memories (arXiv:1911.00172); after prompts, kNN-MT (arXiv:2010.00710).

p = lambda p_kNN + (1 - lambda) p_LM. A memory of conversations has keys of the counted tokens only, the answers, each after
its whole prompt, which is the datastore of kNN-MT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ...core.hooks.evaluation import Decoder, DecoderInputs
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least, check_positive, check_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...core.models.decoding.memories.manifest import MemoryFit

DEFAULT_K = 64
DEFAULT_LAMBDA = 0.25


@dataclass(frozen=True)
class KnnOptions:
    """Options of the interpolation; those left out are the memories' own, fitted on validation text."""

    memory: str | tuple[str, ...] = ()
    """Memories: a name or folder, or several, in a list or separated by commas. All their keys are compared together."""
    k: int | None = None
    """Number of neighbours."""
    temperature: float | None = None
    """Temperature of squared distances."""
    lambda_: float | None = None
    """Weight of the neighbours' distribution; 0: the model alone, 1: the neighbours alone."""
    probes: int | None = None
    """Lists of an `ivf` index that a search reads (default: the memory's)."""

    def __post_init__(self) -> None:
        if self.k is not None:
            check_at_least("k", self.k, 1)
        if self.probes is not None:
            check_at_least("probes", self.probes, 1)
        if self.temperature is not None:
            check_positive("temperature", self.temperature)
        if self.lambda_ is not None:
            check_range("lambda", self.lambda_, 0, 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The memories, each once."""
        given = self.memory.split(",") if isinstance(self.memory, str) else self.memory
        return tuple(dict.fromkeys(name.strip() for name in given if name.strip()))


@dataclass(frozen=True)
class Interpolation:
    """All that the distribution depends on beside the memories."""

    k: int
    temperature: float
    lambda_: float


def resolve_interpolation(options: KnnOptions, fits: Sequence[MemoryFit | None]) -> Interpolation:
    """Return the options with the defaults of the memories: the means of what was fitted, the largest k.

    Raises `UserError` for a temperature that is neither given nor fitted, since distances depend on the model's width.
    """
    fitted = [fit for fit in fits if fit is not None]
    temperature, weight = options.temperature, options.lambda_
    if temperature is None:
        if not fitted:
            raise UserError(
                "decoder 'knn' has no temperature: fit one with `expertctl memory fit`, or give the option temperature"
            )
        temperature = sum(fit.temperature for fit in fitted) / len(fitted)
    if weight is None:
        weight = sum(fit.lambda_ for fit in fitted) / len(fitted) if fitted else DEFAULT_LAMBDA
    return Interpolation(options.k or max((fit.k for fit in fitted), default=DEFAULT_K), temperature, weight)


def named_memories(options: KnnOptions) -> Sequence[str]:
    """Return the names of the memories; raises `UserError` if there is none."""
    if not options.names:
        raise UserError(
            "decoder 'knn' needs a memory: --decoder-option memory=NAME; `expertctl memory list` lists them"
        )
    return options.names


def wrap(inputs: DecoderInputs, options: KnnOptions) -> PreTrainedModel:
    """Return the model that interpolates with the memories."""
    from ...core.models.decoding.memories.model import MemoryModel
    from ...core.models.decoding.memories.search import Datastore

    stores = [Datastore(folder, probes=options.probes, reporter=inputs.reporter) for folder in inputs.memories.values()]
    chosen = resolve_interpolation(options, [store.manifest.fit for store in stores])
    return MemoryModel(inputs.model, stores, k=chosen.k, temperature=chosen.temperature, lambda_=chosen.lambda_)


@hookimpl
def decoders() -> list[Decoder]:
    summary = "the model interpolated with the tokens behind similar contexts of a memory"
    return [Decoder("knn", summary, wrap, options=KnnOptions, memories=named_memories)]
