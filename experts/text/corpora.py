"""Domains: reading their documents, and preparing them into token shards for a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ...core.artefacts.files import exclusive, new_folder, read_json, write_json
from ...core.artefacts.layout import Layout
from ...core.artefacts.lineage import digest_of_tokenizer, package_version
from ...core.config.settings import DomainConfig, ProjectConfig
from ...core.errors import UserError, unknown_name
from ...core.hooks.manager import installed_plugins
from ...core.hooks.text import CorpusFormat, Document
from ...core.text.token_store import TokenPart, TokenStore, write_part
from ...core.text.tokenizer import TextEncoder
from .spooled_texts import SpooledTexts

PARTS = ("train", "valid")
DOMAIN_FILE = "domain.json"
DOCUMENTS_PER_BATCH = 512
CHARACTERS_PER_BATCH = 4 << 20  # of long documents fewer, so that memory stays flat

SPLIT = b"expertctl split\n"
"""What the digest that decides on a document's side begins with."""

Tell = Callable[[int], None]


@dataclass(frozen=True)
class PreparedDomain:
    """A domain whose tokens lie in the corpora cache."""

    name: str
    folder: Path
    train: TokenPart
    valid: TokenPart
    licence: str | None

    def open(self, part: str) -> TokenStore:
        return TokenStore(self.folder / part)

    def statement(self, *, private: bool = False) -> dict[str, object]:
        """Return the data statement of the training part: counts and digest, never text.

        Of private text counts are rounded to two digits, and there is no digest, by which a guess could be confirmed.
        """
        if private:
            counts = {
                name: _two_digits(getattr(self.train, name)) for name in ("documents", "tokens", "bytes")
            }
            return {**counts, "rounded": True, "licence": self.licence}
        return {
            "documents": self.train.documents,
            "tokens": self.train.tokens,
            "bytes": self.train.bytes,
            "digest": self.train.digest,
            "licence": self.licence,
        }


def _two_digits(count: int) -> int:
    """Return a count rounded to its first two digits."""
    return round(count, 2 - len(str(count)))


def domain_config(project: ProjectConfig, name: str) -> DomainConfig:
    """Return a domain's configuration; raises `UserError` that lists the domains there are."""
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
    tell: Tell = lambda documents: None,
) -> PreparedDomain:
    """Tokenise a domain into the cache, unless its current text is there already.

    `tell` hears how many documents were done so far. Raises `UserError` for text that cannot be read and for
    a part without documents.
    """
    encoder_digest = digest_of_tokenizer(tokenizer_folder)
    folder = layout.corpora / name / encoder_digest[:12]
    fingerprint = _fingerprint(domain, layout.root)
    with exclusive(layout.lock(f"domain-{name}"), f"domain '{name}'", patience_s=600):
        if not force and (ready := _cached(folder, fingerprint)):
            return ready
        encoder = TextEncoder.of_folder(tokenizer_folder)
        with new_folder(folder, force=True, what="corpus") as partial:
            done = 0
            for part in PARTS:
                (partial / part).mkdir()
                with _in_order(domain, layout.root, part, partial) as documents:
                    written = write_part(
                        partial / part,
                        _encoded(_counted(documents, done, tell), encoder),
                        separator=encoder.separator,
                        vocabulary=encoder.vocabulary,
                    )
                if written.documents == 0:
                    remedy = (
                        "; a path is split by document and needs two that differ: add text, or give train and "
                        "valid files"
                        if domain.path
                        else ""
                    )
                    raise UserError(
                        f"domain '{name}' has no documents in its {part} part ({_source(domain)}){remedy}"
                    )
                done += written.documents
            write_json(
                partial / DOMAIN_FILE,
                {
                    "name": name,
                    "fingerprint": fingerprint,
                    "tokenizer": encoder_digest,
                    "licence": _licence(domain),
                },
            )
    prepared = _cached(folder, fingerprint)
    assert prepared is not None
    return prepared


@contextmanager
def _in_order(domain: DomainConfig, root: Path, part: str, scratch: Path) -> Iterator[Iterator[str]]:
    """Give the documents of a part as they are packed: those of the training part in the order that was asked for."""
    documents = domain_documents(domain, root, part)
    if domain.order is None or part != "train":
        yield documents
        return
    order = installed_plugins().document_order(domain.order)
    with SpooledTexts(documents, scratch) as texts:
        numbers = [int(number) for number in order.order(texts)]
        if sorted(numbers) != list(range(len(texts))):
            raise RuntimeError(
                f"document order '{order.name}' gives no permutation of {len(texts)} documents"
            )
        yield (texts[number] for number in numbers)


def prepared_domain(
    layout: Layout, name: str, domain: DomainConfig, tokenizer_folder: Path
) -> PreparedDomain | None:
    """Return a domain whose current text lies in the cache, or None; reads no text."""
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


def _encoded(documents: Iterable[str], encoder: TextEncoder) -> Iterator[tuple[str, list[int]]]:
    for batch in _batches(documents):
        yield from zip(batch, encoder.encode(batch), strict=True)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield documents in lists that are encoded together; the size of a batch changes no token."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == DOCUMENTS_PER_BATCH or size >= CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _counted(documents: Iterable[str], before: int, tell: Tell) -> Iterator[str]:
    for index, document in enumerate(documents, start=before + 1):
        if index % DOCUMENTS_PER_BATCH == 0:
            tell(index)
        yield document


def domain_documents(domain: DomainConfig, root: Path, part: str) -> Iterator[str]:
    """Yield the documents of one part of a domain, in a fixed order, without holding them."""
    for document in domain_values(domain, root, part, None):
        yield document.text


def domain_values(domain: DomainConfig, root: Path, part: str, field: str | None) -> Iterator[Document]:
    """Yield the same documents, each with what a field of its record says; `UserError` where records have no fields."""
    if domain.bundled is not None:
        from .bundled import read_bundled

        if field is not None:
            raise UserError(f"bundled text has no field '{field}'; name domains that are read from files")
        yield from map(Document, getattr(read_bundled(domain.bundled), part))
    elif domain.path is not None:
        path = root / Path(domain.path).expanduser()
        border = _split_border(read_documents(path, domain.text_field), domain.valid_share)
        for document in _values(path, domain.text_field, field):
            if (_place(document.text) < border) == (part == "valid"):
                yield document
    else:
        source = domain.train if part == "train" else domain.valid
        assert source is not None
        yield from _values(root / Path(source).expanduser(), domain.text_field, field)


def _split_border(documents: Iterable[str], share: float) -> float:
    """Return the place below which documents are validation text: as large a part of all places as `share`.

    Of a few documents all may lie on one side of it; it then moves so far that the nearest of them stands alone on
    the other. Reads no further than to the first document on each side.
    """
    border = share * 2**64
    lowest, highest = 2**64, -1
    for document in documents:
        place = _place(document)
        lowest, highest = min(lowest, place), max(highest, place)
        if lowest < border <= highest:
            return border
    if lowest >= highest:
        return border  # one document, or none: there is nothing to split
    return lowest + 1 if lowest >= border else highest


def _place(document: str) -> int:
    """Return a number from 0 to 2**64 made of the text itself: equal documents stand on one side of the split.

    Text that was sampled by its plain sha256, as corpora often are, would all stand on one side of it; so the digest
    is one that nothing else takes.
    """
    state = hashlib.sha256(SPLIT + document.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(state[:8], "big")


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yield the documents of a file, or of all files of known formats below a folder, sorted by path."""
    for document in _values(path, text_field, None):
        yield document.text


def _values(path: Path, text_field: str, field: str | None) -> Iterator[Document]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _format_of(file))
        if not files:
            raise UserError(f"{path} has no file of a known format; known endings: {', '.join(_suffixes())}")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"{path} does not exist")
    for file in files:
        corpus_format = _format_of(file)
        if corpus_format is None:
            raise UserError(f"{file} is of no known format; known endings: {', '.join(_suffixes())}")
        if field is None:
            yield from map(Document, corpus_format.read(file, text_field))
        elif corpus_format.read_values is None:
            raise UserError(f"{file}: documents of format '{corpus_format.name}' have no field '{field}'")
        else:
            yield from corpus_format.read_values(file, text_field, field)


def _formats() -> Mapping[str, CorpusFormat]:
    return {
        suffix: corpus_format
        for corpus_format in installed_plugins().corpus_formats().values()
        for suffix in corpus_format.suffixes
    }


def _suffixes() -> list[str]:
    return sorted(_formats())


def _format_of(file: Path) -> CorpusFormat | None:
    matching = [suffix for suffix in _formats() if file.name.lower().endswith(suffix)]
    return _formats()[max(matching, key=len)] if matching else None


def _source(domain: DomainConfig) -> str:
    return domain.path or domain.train or f"bundled: {domain.bundled}"


def _licence(domain: DomainConfig) -> str | None:
    if domain.licence is None and domain.bundled is not None:
        from .bundled import BUNDLED

        return BUNDLED[domain.bundled].licence
    return domain.licence


def _fingerprint(domain: DomainConfig, root: Path) -> str:
    """Return what changes when a domain's text does: its settings, and size and time of every file."""
    content: dict[str, object] = {"domain": domain.model_dump()}
    if domain.bundled is not None:
        content["bundled"] = _installation()
    for source in (domain.path, domain.train, domain.valid):
        if source is not None:
            content[source] = _stamps(root / Path(source).expanduser())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _installation() -> dict[str, str]:
    """Return the versions of what the bundled corpora are read from; finding them out reads no text."""
    import platform

    packages = ("expertctl", "torch", "numpy", "scipy", "scikit-learn")
    return {"python": platform.python_version(), **{name: package_version(name) for name in packages}}


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamps = []
    for file in files:
        if file.is_file():
            status = file.stat()
            stamps.append((str(file.relative_to(path)), status.st_size, status.st_mtime_ns))
    return stamps


def prepare_domains(
    layout: Layout, project: ProjectConfig, names: Iterable[str], tokenizer_folder: Path
) -> list[PreparedDomain]:
    """Prepare several domains; what is prepared already costs nothing."""
    return [prepare_domain(layout, name, domain_config(project, name), tokenizer_folder) for name in names]


def prepared_summary(prepared: PreparedDomain) -> Mapping[str, object]:
    """Return what `data list` shows of a domain."""
    return {part: asdict(getattr(prepared, part)) for part in PARTS} | {"licence": prepared.licence}
