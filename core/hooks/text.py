"""Text: corpus formats, the order of documents, and domains found in unlabelled text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..reporting import SILENT, Reporter
from .option_checks import check_options_class

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..text.token_store import TokenBlocks


@dataclass(frozen=True)
class CorpusFormat:
    """A kind of text file that can be read into documents."""

    name: str
    summary: str
    suffixes: tuple[str, ...]
    """Endings of the files it reads, with the leading dot, longest match first: `(".jsonl", ".jsonl.gz")`."""
    read: Callable[[Path, str], Iterator[str]]
    """`read(path, text_field)` yields the text of each document, in file order, without holding the file.

    Raises `UserError` with the file and, where there are lines, the line number.
    """
    read_values: Callable[[Path, str, str], Iterator[Document]] | None = None
    """`read_values(path, text_field, field)` yields the same documents with what another field says of them;
    None: documents of this format have no further fields."""


@dataclass(frozen=True)
class Document:
    """A text, and what a field of metadata says of it."""

    text: str
    value: str | None = None
    """None where no field was asked for."""


@dataclass(frozen=True)
class DocumentOrder:
    """An order in which a domain's documents are packed into blocks for training."""

    name: str
    summary: str
    order: Callable[[Sequence[str]], Sequence[int]]
    """`order(texts)` returns the numbers of all texts, each once, in their new order. `texts` lie on disk: each access
    reads one, and not all need fit into memory."""


@dataclass(frozen=True)
class DiscoveryInputs:
    """What domains can be found from. Only training text is seen."""

    documents: Callable[[], Iterator[Document]]
    """Reads all documents anew, one by one: they need not fit into memory."""
    sample: Callable[[], Sequence[str]]
    """Returns the beginnings of some documents, drawn by the random seed, in an order that means nothing."""
    clusters: int | None
    """How many domains are asked for; None: as many as there are."""
    random_seed: int
    root: Path
    """Of the workspace: where relative paths begin."""
    seed: Path
    """Folder of the seed, which may not have been made yet."""
    reporter: Reporter = SILENT
    """Receives messages for the user."""


class FoundDomains(Protocol):
    """Domains that were found. N = documents, K = domains."""

    @property
    def labels(self) -> Sequence[str]:
        """What each domain is called within its set, such as `3` or `law`; K different ones."""
        ...

    def distances(self, documents: Sequence[Document]) -> NDArray[Any]:
        """Return how far documents are from the domains, (N, K); each goes to the nearest."""
        ...

    def top_words(self, domain: int) -> Sequence[str]:
        """Return words that tell a human what the domain is about, the best first."""
        ...

    def write(self, folder: Path) -> None:
        """Keep in a folder what is known of the domains."""
        ...


@dataclass(frozen=True)
class DomainDiscoverer:
    """A way to sort unlabelled text into domains."""

    name: str
    summary: str
    fit: Callable[[DiscoveryInputs, Any], FoundDomains]
    """`fit(inputs, options)`; raises `UserError` for text that is too little."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    read: Callable[[Path], FoundDomains] | None = None
    """`read(folder)` returns what was written there, so that documents are sorted in several processes; None: in one."""
    field: Callable[[Any], str] | None = None
    """`field(options)` names the field of metadata that documents are read with; None: text alone."""

    def __post_init__(self) -> None:
        check_options_class(self.options, f"domain discoverer '{self.name}'")


@dataclass(frozen=True)
class ValidationText:
    """The validation part of one domain, cut into blocks."""

    domain: str
    blocks: TokenBlocks
