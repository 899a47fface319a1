"""Text: corpus formats, the order of documents, and domains found in unlabelled text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..reporting import SILENT, Reporter
from .option_checks import check_options_class

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..text.token_store import TokenBlocks


@dataclass(frozen=True)
class CorpusFormat:
    """A format of text files that documents are read from."""

    name: str
    summary: str
    suffixes: tuple[str, ...]
    """Endings of the files it reads, with the leading dot, longest match first: `(".jsonl", ".jsonl.gz")`."""
    read: Callable[[Path, str], Iterator[str]]
    """`read(path, text_field)` yields the text of each document, in file order, without holding the file.

    Raises `UserError` with the file and, where there are lines, the line number.
    """
    read_values: Callable[[Path, str, str], Iterator[Document]] | None = None
    """`read_values(path, text_field, field)` yields the same documents with the value of another field; None: documents
    of this format have no further fields."""
    holds: Literal["text", "conversations", "pairs"] = "text"
    """Whether the texts are conversations, or pairs of a better and a worse one, as JSON (`Conversation.as_text`). Such a format
    is used where a domain names it, whatever other formats read files of these suffixes."""


@dataclass(frozen=True)
class Document:
    """A text, and the value of a metadata field."""

    text: str
    value: str | None = None
    """None if no field was requested."""


@dataclass(frozen=True)
class DocumentOrder:
    """An order in which a domain's documents are packed into blocks for training."""

    name: str
    summary: str
    order: Callable[[Sequence[str]], Sequence[int]]
    """`order(texts)` returns a permutation of the indices of `texts`, which is on disk: each access reads one text, so
    that memory does not grow with the corpus."""


@dataclass(frozen=True)
class DiscoveryInputs:
    """The training text in which domains are to be found."""

    documents: Callable[[], Iterator[Document]]
    """Streams all documents from the start."""
    sample: Callable[[], Sequence[str]]
    """Returns the beginnings of randomly sampled documents, in arbitrary order."""
    clusters: int | None
    """Number of domains to find; None: chosen by the discoverer."""
    random_seed: int
    root: Path
    """Folder of the workspace, which relative paths refer to."""
    seed: Path
    """Folder of the seed, which may not exist yet."""
    reporter: Reporter = SILENT
    """Receives messages for the user."""


class FoundDomains(Protocol):
    """Discovered domains. N = documents, K = domains."""

    @property
    def labels(self) -> Sequence[str]:
        """K distinct names of the domains within their set, such as `3` or `law`."""
        ...

    def distances(self, documents: Sequence[Document]) -> NDArray[Any]:
        """Return the distances of documents from the domains, (N, K); each document is assigned to the nearest."""
        ...

    def top_words(self, domain: int) -> Sequence[str]:
        """Return the most characteristic words of a domain, best first."""
        ...

    def write(self, folder: Path) -> None:
        """Write the domains to a folder, so that `DomainDiscoverer.read` restores them."""
        ...


@dataclass(frozen=True)
class DomainDiscoverer:
    """A method that finds domains in unlabelled text."""

    name: str
    summary: str
    fit: Callable[[DiscoveryInputs, Any], FoundDomains]
    """`fit(inputs, options)`; raises `UserError` for too little text."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    read: Callable[[Path], FoundDomains] | None = None
    """`read(folder)` restores written domains in worker processes; None: documents are assigned in one process."""
    field: Callable[[Any], str] | None = None
    """`field(options)` returns the metadata field to read with the documents; None: text only."""

    def __post_init__(self) -> None:
        check_options_class(self.options, f"domain discoverer '{self.name}'")


@dataclass(frozen=True)
class ValidationText:
    """The validation part of one domain, cut into blocks."""

    domain: str
    blocks: TokenBlocks
