"""From text files to token shards."""

from __future__ import annotations

import gzip
import hashlib
import json
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertctl import UserError
from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.settings import DomainConfig
from expertctl.core.text import tokenizer
from expertctl.core.text.token_store import TokenBlocks
from expertctl.core.text.tokenizer import TextEncoder
from expertctl.experts.text.corpora import PARTS, PreparedDomain, divide, domain_documents, prepare_domain

TEXTS = [f"Document {number}: " + "all work and no play makes a dull boy. " * (number % 5 + 1) for number in range(40)]


def jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "expertctl.yaml").write_text("")
    return Layout(tmp_path)


def prepare(layout: Layout, model_folder: Path, **settings: str) -> PreparedDomain:
    return prepare_domain(layout, "law", DomainConfig.model_validate(settings), model_folder)


def decoded(prepared: PreparedDomain, part: str, folder: Path) -> list[str]:
    """Return the documents of a part, read back from its tokens."""
    encoder = TextEncoder.of_folder(folder)
    store = prepared.open(part)
    documents: list[list[int]] = [[]]
    for token in store.read(1, len(store)).tolist():
        if token == encoder.separator:
            documents.append([])
        else:
            documents[-1].append(token)
    return [encoder.tokenizer.decode(ids) for ids in documents[:-1]]


def test_documents_come_back_whole_and_in_order(layout: Layout, model_folder: Path) -> None:
    train, valid = (
        jsonl(layout.root / "train.jsonl", TEXTS[:30]),
        jsonl(layout.root / "valid.jsonl", TEXTS[30:]),
    )
    prepared = prepare(layout, model_folder, train=train, valid=valid)
    assert decoded(prepared, "train", model_folder) == TEXTS[:30]
    held_out = [decoded(prepared, part, model_folder) for part in ("valid", "test")]
    assert all(held_out)
    assert sorted(held_out[0] + held_out[1]) == sorted(TEXTS[30:])


def test_counts_are_those_of_the_text(layout: Layout, model_folder: Path) -> None:
    text = ["Grüße, 世界!", "second"]
    prepared = prepare(
        layout,
        model_folder,
        train=jsonl(layout.root / "a.jsonl", text),
        valid=jsonl(layout.root / "b.jsonl", text),
    )
    assert prepared.train.documents == 2
    assert prepared.train.bytes == sum(len(part.encode()) for part in text)
    assert prepared.train.tokens == len(prepared.open("train"))


def test_a_second_time_costs_nothing_and_changed_text_is_prepared_again(layout: Layout, model_folder: Path) -> None:
    train, valid = (
        jsonl(layout.root / "train.jsonl", TEXTS[:30]),
        jsonl(layout.root / "valid.jsonl", TEXTS[30:]),
    )
    first = prepare(layout, model_folder, train=train, valid=valid)
    stamp = (first.folder / "domain.json").stat().st_mtime_ns
    again = prepare(layout, model_folder, train=train, valid=valid)
    assert (again.folder / "domain.json").stat().st_mtime_ns == stamp
    jsonl(Path(train), [*TEXTS[:29], "something else altogether"])
    changed = prepare(layout, model_folder, train=train, valid=valid)
    assert changed.train.digest != first.train.digest
    assert changed.valid.digest == first.valid.digest


def test_one_path_is_split_by_document_and_equal_documents_stay_together(layout: Layout, model_folder: Path) -> None:
    many = [f"{text} ({number})" for number in range(10) for text in TEXTS]
    config = DomainConfig(path=jsonl(layout.root / "all.jsonl", many + many))
    parts = {part: list(domain_documents(config, layout.root, part)) for part in PARTS}
    assert sorted(chain.from_iterable(parts.values())) == sorted(many + many)
    assert len(set(many)) == sum(len(set(texts)) for texts in parts.values())
    for part in ("valid", "test"):
        assert 0.05 < len(parts[part]) / len(many + many) < 0.15


def test_text_that_was_sampled_by_its_digest_is_split_like_any_other(layout: Layout) -> None:
    """Corpora are often cut to size by keeping the documents whose sha256 is low."""
    texts = [f"document {number}" for number in range(20_000)]
    sampled = [text for text in texts if hashlib.sha256(text.encode()).digest()[0] < 8]
    parts = split_of(layout, sampled, 0.1)
    assert 0.05 < len(parts["valid"]) / len(sampled) < 0.15


def split_of(layout: Layout, texts: list[str], share: float, test_share: float = 0.1) -> dict[str, list[str]]:
    config = DomainConfig(path=jsonl(layout.root / "all.jsonl", texts), valid_share=share, test_share=test_share)
    parts = {part: list(domain_documents(config, layout.root, part)) for part in PARTS}
    assert sorted(chain.from_iterable(parts.values())) == sorted(texts)
    return parts


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.5, 0.9 - 1e-9])
@pytest.mark.parametrize("count", [3, 4, 10])
def test_a_few_documents_are_split_so_that_no_part_is_empty(layout: Layout, share: float, count: int) -> None:
    parts = split_of(layout, TEXTS[:count], share)
    assert all(parts.values())
    if share == 1e-9:
        assert len(parts["valid"]) == 1


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(max_size=5), max_size=40),
    shares=st.tuples(st.floats(1e-6, 0.9), st.floats(1e-6, 0.9)).filter(lambda pair: sum(pair) < 0.99),
)
def test_parts_have_text_as_far_as_there_are_documents(texts: list[str], shares: tuple[float, float]) -> None:
    division = divide(texts, {"valid": shares[0], "test": shares[1], "train": 1 - sum(shares)})
    used = {division.part_of(text) for text in texts}
    different = len(set(texts))
    if different >= 2:
        assert used >= set(PARTS[:different])
    assert division == divide(texts[::-1], {"valid": shares[0], "test": shares[1], "train": 1 - sum(shares)})


def test_two_documents_are_trained_on_and_validated_with(layout: Layout, model_folder: Path) -> None:
    prepared = prepare(layout, model_folder, path=jsonl(layout.root / "two.jsonl", TEXTS[:2]))
    assert (prepared.train.documents, prepared.valid.documents, prepared.test) == (1, 1, None)
    assert list(prepared.parts) == ["train", "valid"]


def test_a_test_file_leaves_the_validation_text_whole(layout: Layout, model_folder: Path) -> None:
    train, valid, test = (
        jsonl(layout.root / f"{name}.jsonl", TEXTS[begin : begin + 10])
        for begin, name in ((0, "a"), (10, "b"), (20, "c"))
    )
    prepared = prepare(layout, model_folder, train=train, valid=valid, test=test)
    assert decoded(prepared, "valid", model_folder) == TEXTS[10:20]
    assert decoded(prepared, "test", model_folder) == TEXTS[20:30]


def test_copies_of_one_document_cannot_be_split(layout: Layout, model_folder: Path) -> None:
    path = jsonl(layout.root / "one.jsonl", ["the same"] * 3)
    assert sorted(map(len, split_of(layout, ["the same"] * 3, 0.1).values())) == [0, 0, 3]
    with pytest.raises(UserError, match="split by document and needs three different documents: add text, or give"):
        prepare(layout, model_folder, path=path)


def test_long_documents_are_encoded_in_smaller_batches_to_the_same_tokens(
    layout: Layout, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(layout.root / "train.jsonl", TEXTS)
    whole = prepare(layout, model_folder, train=path, valid=path, test=path)
    tokens = whole.open("train").read(0, len(whole.open("train"))).tolist()
    batches = []
    encode = TextEncoder.encode

    def counted(self: TextEncoder, texts: list[str]) -> list[list[int]]:
        batches.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    monkeypatch.setattr(tokenizer, "CHARACTERS_PER_BATCH", 100)
    again = prepare_domain(layout, "law", DomainConfig(train=path, valid=path, test=path), model_folder, force=True)
    assert again.train == whole.train
    assert again.open("train").read(0, len(again.open("train"))).tolist() == tokens
    assert len(batches) > 20
    assert max(batches) < 100 + max(map(len, TEXTS))


def test_a_folder_is_read_sorted_whatever_the_formats(layout: Layout) -> None:
    folder = layout.root / "text"
    jsonl(folder / "b.jsonl", ["from b"])
    (folder / "a.txt").write_text("from a")
    (folder / "sub").mkdir()
    with gzip.open(folder / "sub" / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "from c"}) + "\n")
    (folder / "ignored.png").write_bytes(b"\x89PNG")
    config = DomainConfig(train=str(folder), valid=str(folder))
    assert list(domain_documents(config, layout.root, "train")) == ["from a", "from b", "from c"]


def test_another_field_may_hold_the_text(layout: Layout) -> None:
    config = DomainConfig(path=jsonl(layout.root / "x.jsonl", ["hello"], field="content"), text_field="content")
    assert [
        *domain_documents(config, layout.root, "train"),
        *domain_documents(config, layout.root, "valid"),
        *domain_documents(config, layout.root, "test"),
    ] == ["hello"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"domain 'law' has no documents in its train part"),
        (b'{"text": "fine"}\n{"text": \n', r"train\.jsonl:2"),
        (b'{"text": "fine"}\n{"body": "x"}\n', r"train\.jsonl:2: .*'text'"),
        (b'{"text": "\xff\xfe"}\n', r"train\.jsonl:1: .*UTF-8"),
    ],
    ids=["empty", "invalid", "missing field", "not UTF-8"],
)
def test_text_that_cannot_be_read_is_one_error_and_leaves_no_corpus(
    layout: Layout, model_folder: Path, content: bytes, message: str
) -> None:
    (layout.root / "train.jsonl").write_bytes(content)
    valid = jsonl(layout.root / "valid.jsonl", TEXTS)
    with pytest.raises(UserError, match=message):
        prepare(layout, model_folder, train="train.jsonl", valid=valid)
    assert list((layout.corpora / "law").iterdir()) == []


def test_a_missing_file_and_an_unknown_format_are_named(layout: Layout, model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        prepare(layout, model_folder, train="nowhere.jsonl", valid="nowhere.jsonl")
    (layout.root / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=r"x\.pdf has an unknown format; known suffixes: .*\.jsonl"):
        prepare(layout, model_folder, train="x.pdf", valid="x.pdf")


def test_a_damaged_shard_is_named(layout: Layout, model_folder: Path) -> None:
    train, valid = (
        jsonl(layout.root / "train.jsonl", TEXTS[:30]),
        jsonl(layout.root / "valid.jsonl", TEXTS[30:]),
    )
    prepared = prepare(layout, model_folder, train=train, valid=valid)
    shard = prepared.folder / "train" / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"tokens-00000\.bin is damaged"):
        prepared.open("train")


def test_memory_does_not_grow_with_the_corpus(layout: Layout, model_folder: Path) -> None:
    """The peak of what Python allocates for three times the text stays within a few per cent."""
    import tracemalloc

    peaks = []
    for copies in (20, 60):
        texts = [f"{text} {number}" for number in range(copies) for text in TEXTS]
        train = jsonl(layout.root / f"train{copies}.jsonl", texts)
        tracemalloc.start()
        prepare(layout, model_folder, train=train, valid=jsonl(layout.root / "valid.jsonl", TEXTS[:3]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    size = Path(train).stat().st_size
    assert peaks[1] - peaks[0] < size / 4


def test_every_token_is_read_once_by_evaluation(layout: Layout, model_folder: Path) -> None:
    train, valid = (
        jsonl(layout.root / "train.jsonl", TEXTS[:30]),
        jsonl(layout.root / "valid.jsonl", TEXTS[30:]),
    )
    store = prepare(layout, model_folder, train=train, valid=valid).open("valid")
    targets = [token for batch in TokenBlocks(store, 16).windows(3) for row in batch.tokens for token in row[1:]]
    assert targets == store.read(1, len(store)).tolist()
