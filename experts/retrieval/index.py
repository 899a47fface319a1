"""An index: passages of domains, what finds them, and a manifest that says what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...core.artefacts.digests import digest_of_file
from ...core.artefacts.files import exclusive, link_or_copy, new_folder, read_json, refuse_existing, write_json
from ...core.artefacts.layout import INDEX_MANIFEST, Layout, check_name
from ...core.config.settings import ProjectConfig
from ...core.errors import UserError
from ...core.manifests.records import parse_record, record, record_as_json
from ...core.reporting import SILENT, Reporter, reported
from ...core.text.word_search import Words, require_bm25
from ..text.corpora import domain_config, domain_documents, licence_of, require_text
from .embeddings import Embed, Embeddings, build_embeddings
from .passages import Passage, Passages, split_text, write_passages
from .tuning import Reader, RetrieverTuning, tune_embedder

EMBEDDER = "embedder"
"""Subfolder with the files of the embedding model, so that queries are embedded by the same one."""
PASSAGE = 500
"""Characters of a passage, about 128 tokens of English, as in REPLUG (arXiv:2301.12652)."""


@record
class IndexedDomain:
    """What an index holds of a domain."""

    documents: int = 0
    passages: int = 0
    licence: str | None = None


@record
class IndexManifest:
    """Content of `index.json`."""

    name: str
    search: Literal["words", "embeddings"]
    """BM25, or cosines of embeddings."""
    characters: int
    """Length of the longest passage."""
    domains: Mapping[str, IndexedDomain]
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every file, by path within the folder."""
    tuned_for: str | None = None
    """Name of the language model that the embedding model was tuned for."""


@dataclass(frozen=True)
class Found:
    """A passage that was found, and its score: of BM25, or a cosine."""

    passage: Passage
    score: float


def build_index(
    layout: Layout,
    project: ProjectConfig,
    name: str,
    domains: Sequence[str],
    *,
    embedder: Path | None = None,
    tune_for: Path | None = None,
    tuning: RetrieverTuning | None = None,
    characters: int = PASSAGE,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> IndexManifest:
    """Write `indexes/NAME` with the training text of domains, so that evaluation never finds what it scores.

    By words (BM25), or by the embeddings of a local model, which may be tuned for a language model (`tune_for`, its folder).
    Raises `UserError` for unknown domains, and without text.
    """
    if tune_for is not None and embedder is None:
        raise UserError("only an embedding model can be tuned; name one with --embedder")
    folder = layout.indexes / check_name(name, "an index")
    for domain in domains:
        require_text(domain, domain_config(project, domain), "an index")
    embed = None if embedder is None else _embedder(embedder)
    if embed is None:
        require_bm25()
    refuse_existing(folder, force=force, what="index")
    with (
        exclusive(layout.lock(f"index-{name}"), f"index '{name}'"),
        new_folder(folder, force=force, what="index") as partial,
    ):
        counted = {domain: _Count(licence_of(domain_config(project, domain))) for domain in domains}
        write_passages(partial, _passages(layout, project, counted, characters, reporter))
        passages = Passages(partial)
        if not len(passages):
            raise UserError(f"{', '.join(domains)}: no text to search; name other domains")
        if embed is None:
            Words.of(passage.text for passage in reported(passages, reporter, "words", "passages")).save(partial)
        else:
            assert embedder is not None
            if tune_for is None:
                _keep(embedder, partial / EMBEDDER)
            else:
                tune_embedder(embedder, passages, Reader.of_folder(tune_for), partial / EMBEDDER, tuning, reporter)
                embed = _embedder(partial / EMBEDDER)
            build_embeddings(partial, passages, embed, reporter)
        manifest = IndexManifest(
            name,
            "words" if embed is None else "embeddings",
            characters,
            {domain: count.total() for domain, count in counted.items()},
            {path.relative_to(partial).as_posix(): digest_of_file(path) for path in _files(partial)},
            None if tune_for is None else tune_for.name,
        )
        write_json(partial / INDEX_MANIFEST, record_as_json(manifest))
    return manifest


class Index:
    """An opened index."""

    def __init__(self, folder: Path) -> None:
        """Open an index; raises `UserError` if it is none, or if files are missing or changed."""
        self.manifest = read_index(folder)
        check_files(folder, self.manifest)
        self.passages = Passages(folder)
        self._search: Words | Embeddings = (
            Words.open(folder) if self.manifest.search == "words" else Embeddings(folder, _embedder(folder / EMBEDDER))
        )

    def search(self, queries: Sequence[str], count: int) -> list[list[Found]]:
        """Return the best passages of each query, best first; by words, those without a word of the query are left out."""
        return [
            [Found(self.passages[ranked.number], ranked.score) for ranked in row]
            for row in self._search.search(queries, count)
        ]


def read_index(folder: Path) -> IndexManifest:
    """Return the manifest of an index; raises `UserError` if the folder has none."""
    path = folder / INDEX_MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not an index; build one with `expertctl index build`")
    return parse_record(IndexManifest, read_json(path), str(path))


def check_files(folder: Path, manifest: IndexManifest) -> None:
    """Raise `UserError` that names the first file that is missing or has other bytes than when the index was built."""
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; build the index again")
        if digest_of_file(path) != digest:
            raise UserError(f"{path} has changed since the index was built; build it again")


class _Count:
    """Counts the documents and passages of a domain while they are written."""

    def __init__(self, licence: str | None) -> None:
        self.documents = self.passages = 0
        self._licence = licence

    def total(self) -> IndexedDomain:
        return IndexedDomain(self.documents, self.passages, self._licence)


def _passages(
    layout: Layout, project: ProjectConfig, counted: Mapping[str, _Count], characters: int, reporter: Reporter
) -> Iterator[Passage]:
    for domain, count in counted.items():
        documents = domain_documents(domain_config(project, domain), layout.root, "train")
        for document in reported(documents, reporter, domain, "documents", every=100):
            count.documents += 1
            for text in split_text(document, characters):
                count.passages += 1
                yield Passage(domain, text)


def _embedder(folder: Path) -> Embed:
    from ..measures.embedder import SentenceEmbedder

    return SentenceEmbedder(folder)


def _keep(embedder: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(embedder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            link_or_copy(file, target / file.name)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
