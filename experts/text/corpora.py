"""Domain corpora: reading documents, splitting them and tokenising them into cached shards."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...core.artefacts.digests import digest_of_tokenizer
from ...core.artefacts.files import exclusive, new_folder, read_json, write_json
from ...core.artefacts.layout import Layout
from ...core.artefacts.versions import package_version
from ...core.config.settings import DomainConfig, ProjectConfig
from ...core.errors import UserError, unknown_name
from ...core.hooks.manager import installed_plugins
from ...core.hooks.text import Document, DocumentOrder
from ...core.manifests.statements import DomainStatement
from ...core.reporting import SILENT, Reporter, reported
from ...core.text.token_store import TokenPart, TokenStore, write_part
from ...core.text.tokenizer import DOCUMENTS_PER_BATCH, TextEncoder
from .corpus_folders import read_corpus_folder, require_format
from .spooled_texts import SpooledTexts

PARTS = ("train", "valid")
DOMAIN_FILE = "domain.json"

SPLIT = b"expertctl split\n"
"""Prefix of the hashed text that decides on a document's part."""


@dataclass(frozen=True)
class PreparedDomain:
    """A domain with tokenised text in the corpora cache."""

    name: str
    folder: Path
    train: TokenPart
    valid: TokenPart
    licence: str | None

    def open(self, part: str) -> TokenStore:
        return TokenStore(self.folder / part)

    def statement(self, *, private: bool = False) -> DomainStatement:
        """Return the data statement of the training part: counts and digest, never text.

        For private text, counts are rounded to two digits and the digest is omitted, since it could confirm a guess.
        """
        train = self.train
        if private:
            documents, tokens, size = (two_digits(n) for n in (train.documents, train.tokens, train.bytes))
            return DomainStatement(documents, tokens, size, licence=self.licence, rounded=True)
        return DomainStatement(train.documents, train.tokens, train.bytes, train.digest, self.licence)


def two_digits(count: int) -> int:
    """Return a count rounded to two significant digits: 12,345 -> 12,000."""
    return round(count, 2 - len(str(count)))


def domain_config(project: ProjectConfig, name: str) -> DomainConfig:
    """Return a domain's configuration; raises `UserError` that lists the domains if it is unknown."""
    if name not in project.domains:
        raise unknown_name("domain", name, project.domains, listed_as="expertctl.yaml has")
    return project.domains[name]


def prepare_domain(
    layout: Layout,
    name: str,
    domain: DomainConfig,
    tokenizer_folder: Path,
    *,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> PreparedDomain:
    """Tokenise a domain into the cache, unless its current text is cached already.

    Raises `UserError` for unreadable text and for a part without documents.
    """
    encoder_digest = digest_of_tokenizer(tokenizer_folder)
    folder = layout.corpora / name / encoder_digest[:12]
    fingerprint = _fingerprint(domain, layout.root)
    with exclusive(layout.lock(f"domain-{name}"), f"domain '{name}'", patience_s=600):
        if not force and (cached := _cached(folder, fingerprint)):
            return cached
        encoder = TextEncoder.of_folder(tokenizer_folder)
        _report_files(domain, layout.root, reporter)
        with new_folder(folder, force=True, what="corpus") as partial:
            num_documents = 0
            for part in PARTS:
                (partial / part).mkdir()
                with _ordered_documents(domain, layout.root, part, partial) as documents:
                    counted = reported(
                        documents, reporter, name, "documents", every=DOCUMENTS_PER_BATCH, done=num_documents
                    )
                    written = write_part(
                        partial / part,
                        encoder.encode_stream(counted),
                        separator=encoder.separator,
                        vocabulary=encoder.vocabulary,
                    )
                if written.documents == 0:
                    remedy = (
                        "; a path is split by document and needs two different documents: add text, or give train "
                        "and valid files"
                        if domain.path
                        else ""
                    )
                    source = domain.path or domain.train or f"bundled: {domain.bundled}"
                    raise UserError(f"domain '{name}' has no documents in its {part} part ({source}){remedy}")
                num_documents += written.documents
            write_json(
                partial / DOMAIN_FILE,
                {"name": name, "fingerprint": fingerprint, "tokenizer": encoder_digest, "licence": licence_of(domain)},
            )
    prepared = _cached(folder, fingerprint)
    assert prepared is not None
    return prepared


def _report_files(domain: DomainConfig, root: Path, reporter: Reporter) -> None:
    """Report the use of a folder's files where it is not that of dividing them all by document."""
    path = root / Path(domain.path or "").expanduser()
    if domain.path is not None and path.is_dir():
        folder = read_corpus_folder(path)
        if folder.train or folder.left_out:
            reporter.say(folder.description(path))


@contextmanager
def _ordered_documents(domain: DomainConfig, root: Path, part: str, scratch: Path) -> Iterator[Iterator[str]]:
    """Yield the documents of a part in packing order; only the training part can be reordered."""
    documents = domain_documents(domain, root, part)
    if domain.order is None or part != "train":
        yield documents
        return
    order = installed_plugins().offer(DocumentOrder, domain.order)
    with SpooledTexts(documents, scratch) as texts:
        numbers = [int(number) for number in order.order(texts)]
        if sorted(numbers) != list(range(len(texts))):
            raise RuntimeError(f"document order '{order.name}' does not return a permutation of {len(texts)} documents")
        yield (texts[number] for number in numbers)


def prepared_domain(layout: Layout, name: str, domain: DomainConfig, tokenizer_folder: Path) -> PreparedDomain | None:
    """Return a domain if its current text is cached, otherwise None; reads no text."""
    folder = layout.corpora / name / digest_of_tokenizer(tokenizer_folder)[:12]
    return _cached(folder, _fingerprint(domain, layout.root))


def _cached(folder: Path, fingerprint: str) -> PreparedDomain | None:
    if not (folder / DOMAIN_FILE).is_file():
        return None
    content = read_json(folder / DOMAIN_FILE)
    if content.get("fingerprint") != fingerprint:
        return None
    train, valid = (TokenStore(folder / part).part for part in PARTS)
    return PreparedDomain(content["name"], folder, train, valid, content.get("licence"))


def domain_documents(domain: DomainConfig, root: Path, part: str) -> Iterator[str]:
    """Stream the documents of one part of a domain, in a fixed order."""
    return (document.text for document in domain_values(domain, root, part, None))


def domain_values(domain: DomainConfig, root: Path, part: str, field: str | None) -> Iterator[Document]:
    """Stream the documents of one part, each with the value of a field of its record if `field` is given.

    Raises `UserError` if the records have no fields.
    """
    if domain.bundled is not None:
        from .bundled import read_bundled

        if field is not None:
            raise UserError(f"bundled text has no field '{field}'; use domains that are read from files")
        yield from map(Document, getattr(read_bundled(domain.bundled), part))
    elif domain.path is not None:
        path = root / Path(domain.path).expanduser()
        if path.is_dir() and (named := read_corpus_folder(path)).train:
            yield from _values(named.train if part == "train" else named.valid, domain.text_field, field)
            return
        border = _split_border(read_documents(path, domain.text_field), domain.valid_share)
        for document in _values(_files(path), domain.text_field, field):
            if (_split_position(document.text) < border) == (part == "valid"):
                yield document
    else:
        source = domain.train if part == "train" else domain.valid
        assert source is not None
        yield from _values(_files(root / Path(source).expanduser()), domain.text_field, field)


def _split_border(documents: Iterable[str], share: float) -> float:
    """Return the split position below which documents are validation text.

    It is `share` of the range of positions. If all documents are on one side of it, it is moved so that the nearest
    document is alone on the other side. Stops reading once there is a document on each side.
    """
    border = share * 2**64
    lowest, highest = 2**64, -1
    for document in documents:
        position = _split_position(document)
        lowest, highest = min(lowest, position), max(highest, position)
        if lowest < border <= highest:
            return border
    if lowest >= highest:
        return border  # at most one distinct document: nothing to split
    return lowest + 1 if lowest >= border else highest


def _split_position(document: str) -> int:
    """Return a hash of the text from 0 to 2**64 - 1; equal documents are in the same part.

    The hash has a prefix of its own because corpora are often sampled by the plain sha256 of documents, which would
    put all of them on one side.
    """
    state = hashlib.sha256(SPLIT + document.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(state[:8], "big")


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """Stream the documents of a file, or of all files of known formats below a folder, sorted by path."""
    return (document.text for document in _values(_files(path), text_field, None))


def _files(path: Path) -> Sequence[Path]:
    """Return the files of documents at a path; a folder's validation text is among them, its test text is not."""
    if path.is_dir():
        folder = read_corpus_folder(path)
        return sorted((*folder.documents, *folder.train, *folder.valid))
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return [path]


def _values(files: Sequence[Path], text_field: str, field: str | None) -> Iterator[Document]:
    for file in files:
        corpus_format = require_format(file)
        if field is None:
            yield from map(Document, corpus_format.read(file, text_field))
        elif corpus_format.read_values is None:
            raise UserError(f"{file}: documents of format '{corpus_format.name}' have no field '{field}'")
        else:
            yield from corpus_format.read_values(file, text_field, field)


def licence_of(domain: DomainConfig) -> str | None:
    """Return the licence of a domain's text."""
    if domain.licence is None and domain.bundled is not None:
        from .bundled import BUNDLED

        return BUNDLED[domain.bundled].licence
    return domain.licence


def _fingerprint(domain: DomainConfig, root: Path) -> str:
    """Return a digest of a domain's settings and of the size and modification time of its files."""
    content: dict[str, object] = {"domain": domain.model_dump()}
    if domain.bundled is not None:  # read from these packages
        packages = ("expertctl", "torch", "numpy", "scipy", "scikit-learn")
        versions = {name: package_version(name) for name in packages}
        content["bundled"] = {"python": platform.python_version(), **versions}
    for source in (domain.path, domain.train, domain.valid):
        if source is not None:
            content[source] = _stamps(root / Path(source).expanduser())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    files = [file for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    statuses = ((file, file.stat()) for file in files)
    return [(str(file.relative_to(path)), status.st_size, status.st_mtime_ns) for file, status in statuses]
