"""Domain corpora: reading documents, splitting them and tokenising them into cached shards."""

from __future__ import annotations

import hashlib
import json
import platform
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from ...core.artefacts.digests import digest_of_tokenizer
from ...core.artefacts.files import exclusive, new_folder, read_json, write_json
from ...core.artefacts.layout import Layout
from ...core.artefacts.versions import package_version
from ...core.config.settings import DomainConfig, ProjectConfig, TrainingConfig
from ...core.errors import UserError, unknown_name
from ...core.hooks.manager import installed_plugins
from ...core.hooks.steps import Objective
from ...core.hooks.text import CorpusFormat, Document, DocumentOrder
from ...core.manifests.statements import DomainStatement
from ...core.remote.copies import digests_of_copy, refresh, source_path
from ...core.remote.urls import is_url, without_secrets
from ...core.reporting import SILENT, Reporter, reported
from ...core.text.rendering import ConversationEncoder, resolved_template
from ...core.text.token_store import FORMAT, TokenPart, TokenStore, write_conversations, write_part
from ...core.text.tokenizer import DOCUMENTS_PER_BATCH, TextEncoder, load_tokenizer
from .corpus_folders import read_corpus_folder, require_format
from .spooled_texts import SpooledTexts

PARTS = ("train", "valid", "test")
"""Models are trained on `train`; what is fitted or chosen afterwards reads `valid`; evaluation reads `test`."""
DOMAIN_FILE = "domain.json"

NEGLIGIBLE_LOSS = 0.001
"""Share of the bytes that a tokenizer may lose without a warning: single white space at the ends of documents."""

SPLIT = b"expertctl split\n"
"""Prefix of the hashed text that decides on a document's part."""


@dataclass(frozen=True)
class PreparedDomain:
    """A domain with tokenised text in the corpora cache."""

    name: str
    folder: Path
    train: TokenPart
    valid: TokenPart
    test: TokenPart | None
    """None if there is too little text for a part of its own."""
    licence: str | None

    @property
    def parts(self) -> Mapping[str, TokenPart]:
        """The parts with text, by name."""
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    def open(self, part: str) -> TokenStore:
        """Return the tokens of a part that has text."""
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
    """Tokenise a domain into the cache, unless its current text is cached already; say what its tokenizer loses.

    Raises `UserError` for unreadable text, and without documents to train on or to validate with.
    """
    prepared = _prepare(layout, name, domain, tokenizer_folder, force, reporter)
    if lost := lost_text(prepared):
        reporter.say(lost)
    return prepared


def _prepare(
    layout: Layout, name: str, domain: DomainConfig, tokenizer_folder: Path, force: bool, reporter: Reporter
) -> PreparedDomain:
    encoder_digest = digest_of_tokenizer(tokenizer_folder)
    folder = layout.corpora / name / encoder_digest[:12]
    for source in filter(is_url, _sources(domain)):
        refresh(layout.root, source, reporter)
    fingerprint = _fingerprint(domain, layout.root)
    with exclusive(layout.lock(f"domain-{name}"), f"domain '{name}'", patience_s=600):
        if not force and (cached := _cached(folder, fingerprint)):
            return cached
        encoder = _encoder(domain, tokenizer_folder, layout.root)
        _report_files(domain, layout.root, reporter)
        with new_folder(folder, force=True, what="corpus") as partial:
            num_documents = 0
            for part in PARTS:
                (partial / part).mkdir()
                with _ordered_documents(domain, layout.root, part, partial) as documents:
                    counted = reported(
                        documents, reporter, name, "documents", every=DOCUMENTS_PER_BATCH, done=num_documents
                    )
                    written = _write(partial / part, encoder, counted, measure_loss=part != "train")
                if written.documents == 0 and part != "test":
                    remedy = (
                        "; a path is split by document and needs three different documents: add text, or give train, "
                        "valid and test files"
                        if domain.path
                        else ""
                    )
                    source = without_secrets(domain.path or domain.train or f"bundled: {domain.bundled}")
                    raise UserError(f"domain '{name}' has no documents in its {part} part ({source}){remedy}")
                num_documents += written.documents
            remote = {
                without_secrets(url): digests_of_copy(layout.root, url) for url in _sources(domain) if is_url(url)
            }
            write_json(
                partial / DOMAIN_FILE,
                {
                    "name": name,
                    "fingerprint": fingerprint,
                    "tokenizer": encoder_digest,
                    "licence": licence_of(domain),
                    **({"remote": remote} if remote else {}),
                },
            )
    prepared = _cached(folder, fingerprint)
    assert prepared is not None
    return prepared


def _encoder(domain: DomainConfig, tokenizer_folder: Path, root: Path) -> TextEncoder | ConversationEncoder:
    if not has_conversations(domain):
        return TextEncoder.of_folder(tokenizer_folder)
    template = resolved_template(domain.chat_template, tokenizer_folder, root)
    return ConversationEncoder.of_folder(tokenizer_folder, template, domain.counts)


def _write(
    folder: Path, encoder: TextEncoder | ConversationEncoder, texts: Iterable[str], *, measure_loss: bool
) -> TokenPart:
    documents = encoder.encode_stream(texts, measure_loss=measure_loss)
    if isinstance(encoder, ConversationEncoder):
        return write_conversations(folder, documents, markers=encoder.markers, vocabulary=encoder.vocabulary)
    return write_part(
        folder, documents, separator=encoder.separator, vocabulary=encoder.vocabulary, begin=encoder.begin
    )


def example_of(prepared: PreparedDomain, tokenizer_folder: Path) -> list[tuple[str, bool]]:
    """Return the first conversation of a domain as its model reads it: pieces of text, each with whether it counts."""
    store = prepared.open("train")
    end = int(store.ends[0])
    tokenizer: Any = load_tokenizer(tokenizer_folder)
    tokens = zip(store.read(0, end).tolist(), store.counted(0, end).tolist(), strict=True)
    return [
        (tokenizer.decode([token for token, _ in piece], skip_special_tokens=False), counts)
        for counts, piece in groupby(tokens, key=lambda pair: pair[1])
    ]


def has_conversations(domain: DomainConfig) -> bool:
    """Return whether a domain's documents are conversations; raises `UserError` for an unknown format."""
    return contents_of(domain) != "text"


def contents_of(domain: DomainConfig) -> str:
    """Return what a domain's documents are: `text`, `conversations` or `pairs`; raises `UserError` for an unknown format."""
    return "text" if domain.format is None else installed_plugins().offer(CorpusFormat, domain.format).holds


def require_contents(name: str, domain: DomainConfig, training: TrainingConfig) -> None:
    """Raise `UserError` for a domain whose documents the objective of a run cannot read."""
    objective, contents = installed_plugins().offer(Objective, training.objective), contents_of(domain)
    if contents not in objective.reads:
        raise UserError(
            f"objective '{objective.name}' reads {' and '.join(objective.reads)}, and domain '{name}' holds {contents}; set "
            "another objective, or the domain's format"
        )


def require_text(name: str, domain: DomainConfig, what: str) -> None:
    """Raise `UserError` for a domain of conversations, where `what` reads plain text."""
    if has_conversations(domain):
        raise UserError(f"{what} reads plain text, and domain '{name}' holds conversations; use another domain")


def lost_text(domain: PreparedDomain) -> str | None:
    """Return a sentence about text that the tokenizer does not give back; None if that is less than a thousandth."""
    measured = [part for part in (domain.valid, domain.test) if part is not None]
    lost, size = sum(part.lost_bytes for part in measured), sum(part.bytes for part in measured)
    if lost <= NEGLIGIBLE_LOSS * size:
        return None
    return (
        f"domain '{domain.name}': the tokenizer loses {lost / size:.1%} of the text (unknown tokens, or characters that it "
        "changes); evaluation charges 8 bits for each lost byte; a tokenizer for this text would keep it"
    )


def _report_files(domain: DomainConfig, root: Path, reporter: Reporter) -> None:
    """Report the use of a folder's files where it is not that of dividing them all by document."""
    if domain.path is not None and (path := source_path(root, domain.path)).is_dir():
        folder = read_corpus_folder(path, domain.format)
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
    train, valid, test = (TokenStore(folder / part).part for part in PARTS)
    return PreparedDomain(
        content["name"], folder, train, valid, test if test.documents else None, content.get("licence")
    )


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
        path = source_path(root, domain.path)
        if path.is_dir() and (named := read_corpus_folder(path, domain.format)).train:
            yield from _named_part(lambda name: getattr(named, name), part, domain, field)
            return
        rest = 1 - domain.valid_share - domain.test_share
        shares = {"valid": domain.valid_share, "test": domain.test_share, "train": rest}
        files = _files(path, domain.format)
        division = divide((document.text for document in _values(files, domain, None)), shares)
        yield from _divided(files, division, part, domain, field)
    else:
        sources = {"train": domain.train, "valid": domain.valid, "test": domain.test}

        def files_of(name: str) -> Sequence[Path]:
            source = sources[name]
            return _files(source_path(root, source), domain.format) if source is not None else ()

        yield from _named_part(files_of, part, domain, field)


def _named_part(
    files: Callable[[str], Sequence[Path]], part: str, domain: DomainConfig, field: str | None
) -> Iterator[Document]:
    """Stream a part of a corpus whose files name the parts; without test files, half of the validation text is test."""
    if part == "train" or files("test"):
        yield from _values(files(part), domain, field)
    else:
        valid = (document.text for document in _values(files("valid"), domain, None))
        halves = divide(valid, {"valid": 0.5, "test": 0.5})
        yield from _divided(files("valid"), halves, part, domain, field)


def _divided(
    files: Sequence[Path], division: Division, part: str, domain: DomainConfig, field: str | None
) -> Iterator[Document]:
    """Stream the documents that a division puts into a part."""
    documents = _values(files, domain, field)
    return (document for document in documents if division.part_of(document.text) == part)


@dataclass(frozen=True)
class Division:
    """A division of documents into parts by a hash of their text."""

    parts: tuple[str, ...]
    borders: tuple[int, ...]
    """Hash at which each part but the first begins."""

    def part_of(self, document: str) -> str:
        """Return the part of a document; equal documents have the same one."""
        return self.parts[bisect_right(self.borders, _split_position(document))]


def divide(documents: Iterable[str], shares: Mapping[str, float]) -> Division:
    """Divide the range of hashes by the shares of the parts, in their order; stops reading once every part has a document.

    Borders are moved where a part would be empty. With fewer different documents than parts, the last of `PARTS` are
    empty.
    """
    parts = tuple(shares)
    division = Division(parts, tuple(int(share * 2**64) for share in accumulate(shares.values()))[:-1])
    positions: set[int] = set()
    used: set[str] = set()
    for document in documents:
        positions.add(_split_position(document))
        used.add(division.part_of(document))
        if len(used) == len(parts):
            return division
    ordered = sorted(positions)
    counts = Counter(parts[bisect_right(division.borders, position)] for position in ordered)
    needed = [part for part in PARTS if part in shares][: len(ordered)]
    for part in needed:
        if not counts[part]:
            counts[max(parts, key=lambda other: counts[other] - (other in needed))] -= 1
            counts[part] += 1
    ends = list(accumulate(counts[part] for part in parts))[:-1]
    return Division(parts, tuple(ordered[end] if end < len(ordered) else 2**64 for end in ends))


def _split_position(document: str) -> int:
    """Return a hash of the text from 0 to 2**64 - 1; equal documents are in the same part.

    The hash has a prefix of its own because corpora are often sampled by the plain sha256 of documents, which would
    put all of them on one side.
    """
    state = hashlib.sha256(SPLIT + document.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(state[:8], "big")


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """Stream the documents of a file, or of all files of known formats below a folder, sorted by path."""
    domain = DomainConfig(path=str(path), text_field=text_field)
    return (document.text for document in _values(_files(path, None), domain, None))


def _files(path: Path, format_name: str | None) -> Sequence[Path]:
    """Return the files of documents at a path; a folder's named parts are among them."""
    if path.is_dir():
        folder = read_corpus_folder(path, format_name)
        return sorted((*folder.documents, *folder.train, *folder.valid, *folder.test))
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return [path]


def _values(files: Sequence[Path], domain: DomainConfig, field: str | None) -> Iterator[Document]:
    for file in files:
        corpus_format = require_format(file, domain.format)
        if field is None:
            yield from map(Document, corpus_format.read(file, domain.text_field))
        elif corpus_format.read_values is None:
            raise UserError(f"{file}: documents of format '{corpus_format.name}' have no field '{field}'")
        else:
            yield from corpus_format.read_values(file, domain.text_field, field)


def licence_of(domain: DomainConfig) -> str | None:
    """Return the licence of a domain's text."""
    if domain.licence is None and domain.bundled is not None:
        from .bundled import BUNDLED

        return BUNDLED[domain.bundled].licence
    return domain.licence


def _fingerprint(domain: DomainConfig, root: Path) -> str:
    """Return a digest of a domain's settings and of its files: their size and modification time, or sha256 if remote."""
    content: dict[str, object] = {"format": FORMAT, "domain": domain.model_dump()}
    if domain.bundled is not None:  # read from these packages
        packages = ("expertctl", "torch", "numpy", "scipy", "scikit-learn")
        versions = {name: package_version(name) for name in packages}
        content["bundled"] = {"python": platform.python_version(), **versions}
    template = root / (domain.chat_template or "")
    if template.is_file():
        content["chat_template"] = template.read_text(encoding="utf-8")
    for source in _sources(domain):
        content[source] = digests_of_copy(root, source) if is_url(source) else _stamps(source_path(root, source))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sources(domain: DomainConfig) -> list[str]:
    """Return the files, folders and URLs of a domain."""
    return [source for source in (domain.path, domain.train, domain.valid, domain.test) if source is not None]


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    files = [file for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    statuses = ((file, file.stat()) for file in files)
    return [(str(file.relative_to(path)), status.st_size, status.st_mtime_ns) for file, status in statuses]
