"""Ensembles: mixers, which weight the members depending on the text.

Shapes: K = members, B = batch, T = tokens, V = vocabulary. Log weights are natural logarithms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .option_checks import check_options_class

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .merging import BuiltModel, MergeInputs


class TextState(Protocol):
    """State of a mixer after the texts of a batch so far; kept in the cache of `generate()`.

    A state may also have `append_rows(other)`, which returns the state of a batch with the rows of both. Without it, a server
    generates one text at a time.
    """

    def __len__(self) -> int:
        """Return the number of rows, B."""
        ...

    def select_rows(self, rows: Sequence[int]) -> TextState:
        """Return the state of a batch with these rows, each of which may occur several times."""
        ...


class MixingPass(ABC):
    """The weights of one forward pass; members are read one by one, in order."""

    needs_all_members = False
    """Whether a member's weight depends on members that are read after it; `finish` then returns the weights."""

    def is_skipped(self, member: int, kept: slice) -> bool:
        """Return whether a member has weight 0 at all the kept positions, so that it need not run."""
        return False

    @abstractmethod
    def log_weights(self, member: int, log_probs_BTV: Tensor) -> Tensor:
        """Return the log weight of a member after each token, (B, T), given its predictions (B, t + T, V).

        t is the number of tokens before this pass that the member was skipped for.
        """

    @abstractmethod
    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Return normalised log weights (B, T, K), and the log of their sum before normalisation, (B, T), or None if it is 1."""

    @abstractmethod
    def state(self) -> TextState:
        """Return the state after these tokens."""


class TextMixer(ABC):
    """Weights the members of an ensemble while they read text."""

    @property
    @abstractmethod
    def active(self) -> Sequence[int]:
        """Indices of the members that can have a weight above 0; the others are not loaded."""

    @property
    def domains(self) -> Sequence[str]:
        """Domains whose texts are weighted in a way of their own, if `begin_text` names them."""
        return ()

    @property
    def learns_from_text(self) -> bool:
        """Whether scored texts change later weights; by default, of mixers that forget texts in `begin_text`."""
        return type(self).begin_text is not TextMixer.begin_text

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the JSON content that `Mixer.read` restores it from, with the files of `write`."""

    def write(self, folder: Path) -> None:  # noqa: B027  # most mixers have no files
        """Write the files that `Mixer.read` needs beside the settings."""

    def current(self) -> TextMixer:
        """Return the mixer of the active members as it is after the texts so far, to be saved."""
        return self.subset(self.active)

    @abstractmethod
    def subset(self, members: Sequence[int]) -> TextMixer:
        """Return the mixer of some of the members; raises `UserError` if they have no weight."""

    def begin_text(self, domain: str | None = None) -> None:  # noqa: B027  # most mixers treat each text alone
        """Forget the texts that were scored before, if they change later weights; the next are of one of `domains`."""

    @abstractmethod
    def begin(self, ids_BT: Tensor, mask_BT: Tensor | None, counts_BT: Tensor, state: TextState | None) -> MixingPass:
        """Begin a forward pass over tokens that continue the texts of `state`.

        `mask_BT` is 0 for padding, `counts_BT` 1 for tokens that are predicted from a token before them.
        """

    @abstractmethod
    def joint_log_probs(self, members: Sequence[nn.Module], tokens_BT1: Tensor, *, adapt: bool) -> Tensor:
        """Return log(weight_k p_k(x_t | x_<t)) of targets, (K, B, T); with `adapt`, the texts then update weights."""


@dataclass(frozen=True)
class Mixer:
    """A way to weight the members of an ensemble."""

    name: str
    summary: str
    fit: Callable[[MergeInputs, Any], tuple[TextMixer, BuiltModel]]
    """`fit(inputs, options)` returns the mixer of the experts, and the weights and options to record."""
    read: Callable[[Mapping[str, Any], Path | None], TextMixer]
    """`read(settings, folder)` restores a mixer; the folder is None for a model that is made without files."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""

    def __post_init__(self) -> None:
        check_options_class(self.options, f"mixer '{self.name}'")
