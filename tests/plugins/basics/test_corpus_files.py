"""The built-in corpus formats: what they yield, and the one line they raise for a broken file."""

import builtins
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertctl.core.errors import UserError
from expertctl.core.hooks.text import CorpusFormat
from expertctl.plugins.basics import corpus_files
from expertctl.plugins.basics.corpus_files import corpus_formats, read_jsonl, read_parquet, read_text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **options)
    return path


def error_of(corpus_format: str, path: Path, text_field: str = "text") -> str:
    """Read a file that must fail, and return the message without the folder."""
    with pytest.raises(UserError) as caught:
        list(by_name(corpus_format).read(path, text_field))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(f"{path.parent}/")


def by_name(name: str) -> CorpusFormat:
    return next(offer for offer in corpus_formats() if offer.name == name)


def test_the_built_in_formats_and_their_suffixes() -> None:
    assert {offer.name: offer.suffixes for offer in corpus_formats()} == {
        "jsonl": (".jsonl", ".jsonl.gz"),
        "text": (".txt", ".md"),
        "parquet": (".parquet",),
    }
    assert all(offer.summary for offer in corpus_formats())


# --- jsonl ---


def test_jsonl_yields_the_named_field_of_each_line(tmp_path: Path) -> None:
    path = written(tmp_path / "law.jsonl", '{"body": "one", "id": 1}\n{"id": 2, "body": "zwölf"}')
    assert list(read_jsonl(path, "body")) == ["one", "zwölf"]


def test_blank_lines_and_empty_texts_are_skipped(tmp_path: Path) -> None:
    path = written(tmp_path / "law.jsonl", '\n{"text": "a"}\n  \n{"text": ""}\n{"text": " \\n"}\n{"text": "b"}\n\n')
    assert list(read_jsonl(path, "text")) == ["a", "b"]


def test_an_empty_jsonl_file_has_no_documents(tmp_path: Path) -> None:
    assert list(read_jsonl(written(tmp_path / "law.jsonl", ""), "text")) == []


def test_windows_line_ends_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    path = written(tmp_path / "law.jsonl", '\ufeff{"text": "a"}\r\n{"text": "b"}\r\n')
    assert list(read_jsonl(path, "text")) == ["a", "b"]


def test_gzipped_jsonl_reads_as_the_plain_one_does(tmp_path: Path) -> None:
    path = written(tmp_path / "law.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "b"}\n', mtime=0))
    assert list(read_jsonl(path, "text")) == ["a", "b"]


@given(st.lists(TEXTS))
def test_jsonl_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) + "\n" for text in texts)
    path = written(tmp_path_factory.mktemp("jsonl") / "law.jsonl", lines)
    assert list(read_jsonl(path, "text")) == [text for text in texts if text.strip()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "a"',
            "law.jsonl:3: not valid JSON (Expecting ',' delimiter at column 13); each line must be",
        ),
        ("[" * 100_000, "law.jsonl:3: not valid JSON ("),
        ('{"text": ' + "1" * 5000 + "}", "law.jsonl:3: not valid JSON ("),
        ('["a"]', 'law.jsonl:3: a list, not an object; write each line as {"text": …}'),
        ('"a"', "law.jsonl:3: a string, not an object"),
        ("null", "law.jsonl:3: null, not an object"),
        (
            '{"body": "a", "id": 1}',
            "law.jsonl:3: no field 'text'; fields: body, id; set text_field to the one with the text",
        ),
        ("{}", "law.jsonl:3: no field 'text'; fields: none"),
        ('{"text": 7}', "law.jsonl:3: 'text' is a number, not a string; fix or remove it, or set text_field"),
        ('{"text": null}', "law.jsonl:3: 'text' is null, not a string"),
        ('{"text": ["a"]}', "law.jsonl:3: 'text' is a list, not a string"),
        ('{"text": "\\ud83d"}', "law.jsonl:3: 'text' has a lone surrogate (half a character) at position 0"),
        (b'{"text": "caf\xe9"}', "law.jsonl:3: not UTF-8 at byte 13 of the line; save the file as UTF-8"),
    ],
)
def test_a_broken_line_is_named_with_its_fault_and_remedy(tmp_path: Path, line: str | bytes, message: str) -> None:
    line = line.encode("utf-8") if isinstance(line, str) else line
    path = written(tmp_path / "law.jsonl", b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    assert error_of("jsonl", path).startswith(message)


def test_documents_before_a_broken_line_are_yielded_first(tmp_path: Path) -> None:
    reader = read_jsonl(written(tmp_path / "law.jsonl", '{"text": "a"}\nbroken\n'), "text")
    assert next(reader) == "a"
    with pytest.raises(UserError, match=r"law\.jsonl:2"):
        next(reader)


def test_field_names_in_a_message_stay_on_one_line_and_short(tmp_path: Path) -> None:
    record = {"a\nb": 1} | {f"field{index}": 1 for index in range(1000)}
    message = error_of("jsonl", written(tmp_path / "law.jsonl", json.dumps(record)))
    assert "fields: a b, field0, field1" in message
    assert len(message) < 400


def test_a_gzip_file_that_is_cut_short_says_so_with_the_line(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {index * 7919}"}) + "\n" for index in range(2000))
    path = written(tmp_path / "law.jsonl.gz", gzip.compress(lines.encode())[:-2000])
    message = error_of("jsonl", path)
    assert message.startswith("law.jsonl.gz:")
    assert "the gzip data is truncated or damaged" in message
    assert int(message.split(":")[1]) > 1


@pytest.mark.parametrize("content", [b'{"text": "plain"}\n', gzip.compress(b"x" * 99, mtime=0)[:10] + b"\xff" * 40])
def test_invalid_gzip_data_is_named(tmp_path: Path, content: bytes) -> None:
    message = error_of("jsonl", written(tmp_path / "law.jsonl.gz", content))
    assert message.startswith("law.jsonl.gz:1: the gzip data is truncated or damaged")


def test_reading_jsonl_does_not_hold_the_file(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    path = written(tmp_path / "law.jsonl", line * 2000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_jsonl(path, "text")) == 2000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# --- text ---


def test_a_text_file_is_one_document_whatever_the_field(tmp_path: Path) -> None:
    path = written(tmp_path / "notes.md", "\ufeff# Notes\n\nzwölf\n")
    assert list(read_text(path, "unused")) == ["# Notes\n\nzwölf\n"]


def test_an_empty_text_file_has_no_documents(tmp_path: Path) -> None:
    assert list(read_text(written(tmp_path / "notes.txt", " \n\t"), "text")) == []


def test_text_that_is_not_utf_8_names_the_byte(tmp_path: Path) -> None:
    message = error_of("text", written(tmp_path / "notes.txt", "café".encode("latin-1")))
    assert message == "notes.txt: not UTF-8 at byte offset 3; save the file as UTF-8"


@pytest.fixture
def short_documents(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make text documents end after so few bytes that a test can show it."""
    monkeypatch.setattr(corpus_files, "TEXT_DOCUMENT_BYTES", 24)
    return 24


def test_a_text_of_just_the_limit_is_one_document(tmp_path: Path, short_documents: int) -> None:
    text = "a line\n\n" * (short_documents // 8)
    assert list(read_text(written(tmp_path / "notes.txt", text), "text")) == [text]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\ntwo\n\nthree four\n\nfive six\n", ["one\ntwo\n\nthree four\n\n", "five six\n"]),
        ("one\r\ntwo\r\n\r\nthree\r\nfour\r\nfive", ["one\r\ntwo\r\n\r\n", "three\r\nfour\r\nfive"]),
        ("one\ntwo\nthree\nfour\nfive six", ["one\ntwo\nthree\nfour\n", "five six"]),
        ("one two three four five six", ["one two three four five ", "six"]),
        ("ü" * 20, ["ü" * 12, "ü" * 8]),
        ("x" + "🌍" * 8, ["x" + "🌍" * 5, "🌍" * 3]),
        ("\ufeff" + "x" * 30, ["x" * 21, "x" * 9]),
    ],
    ids=[
        "paragraphs",
        "paragraphs of Windows",
        "lines",
        "words",
        "characters",
        "longer characters",
        "byte-order mark",
    ],
)
def test_a_large_text_is_cut_between_paragraphs_or_as_near_to_that_as_can_be(
    tmp_path: Path, short_documents: int, text: str, documents: list[str]
) -> None:
    assert list(read_text(written(tmp_path / "notes.txt", text), "text")) == documents


@given(st.lists(st.sampled_from(["\n\n", "\n", " ", "a", "ü", "世界", "🌍", "word"]), max_size=60).map("".join))
def test_the_documents_of_a_large_text_are_the_whole_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = written(tmp_path_factory.mktemp("text") / "notes.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files, "TEXT_DOCUMENT_BYTES", 9)
        documents = list(read_text(path, "text"))
    assert all(len(document.encode()) <= 9 for document in documents)
    # a document that were nothing but white space is left out
    assert "".join("".join(documents).split()) == "".join(text.split())


def test_text_that_is_not_utf_8_names_the_byte_of_the_file_and_not_of_a_piece(
    tmp_path: Path, short_documents: int
) -> None:
    content = b"a paragraph\n\n" * 5 + b"caf\xe9\n"
    message = error_of("text", written(tmp_path / "notes.txt", content))
    assert message == "notes.txt: not UTF-8 at byte offset 68; save the file as UTF-8"


def test_reading_a_text_does_not_hold_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "book.txt", ("x" * 998 + "\n\n") * 40_000)
    tracemalloc.start()
    try:
        sizes = [len(document) for document in read_text(path, "text")]
        assert tracemalloc.get_traced_memory()[1] < 24_000_000
    finally:
        tracemalloc.stop()
    assert sum(sizes) == 40_000_000
    assert max(sizes) <= 4 << 20
    assert all(size % 1000 == 0 for size in sizes)


# --- parquet ---


def test_parquet_yields_the_named_column_across_row_groups(tmp_path: Path) -> None:
    texts = [f"document {index}" for index in range(1000)]
    path = parquet(tmp_path / "law.parquet", {"id": list(range(1000)), "body": texts}, row_group_size=300)
    assert list(read_parquet(path, "body")) == texts


def test_parquet_skips_empty_texts_and_reads_dictionary_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    column = pa.array(["a", "", " \n", "b"]).dictionary_encode()
    assert list(read_parquet(parquet(tmp_path / "law.parquet", {"text": column}), "text")) == ["a", "b"]


def test_a_missing_parquet_column_lists_the_columns(tmp_path: Path) -> None:
    message = error_of("parquet", parquet(tmp_path / "law.parquet", {"body": ["a"], "id": [1]}))
    expected = "law.parquet: no column 'text'; columns: body, id; set text_field to the one with the text"
    assert message == expected


def test_a_parquet_column_that_is_not_text_says_what_it_holds(tmp_path: Path) -> None:
    message = error_of("parquet", parquet(tmp_path / "law.parquet", {"text": [1, 2]}))
    assert message.startswith("law.parquet: column 'text' holds int64, not strings")


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_every_kind_of_string_in_parquet_is_read(kind: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    column = pa.array(["a", "größe"], getattr(pa, kind)())
    assert list(read_parquet(parquet(tmp_path / "law.parquet", {"text": column}), "text")) == ["a", "größe"]


def test_a_parquet_null_names_its_row(tmp_path: Path) -> None:
    path = parquet(tmp_path / "law.parquet", {"text": ["a"] * 700 + [None]}, row_group_size=300)
    assert error_of("parquet", path).startswith("law.parquet: row 701: 'text' is null, not a string")


def test_parquet_text_that_is_not_utf_8_names_its_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    column = pa.array([b"a", b"caf\xe9"]).view(pa.string())
    assert error_of("parquet", parquet(tmp_path / "law.parquet", {"text": column})).startswith(
        "law.parquet: row 2: 'text' is not UTF-8"
    )


@pytest.mark.parametrize("content", [b"", b"not parquet at all", b"PAR1" + b"\x00" * 40 + b"PAR1"])
def test_invalid_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("pyarrow")
    message = error_of("parquet", written(tmp_path / "law.parquet", content))
    assert message.startswith("law.parquet: not a Parquet file, or damaged after row 0 (")


def test_parquet_with_damaged_pages_says_so(tmp_path: Path) -> None:
    texts = [f"document {index}" for index in range(5000)]
    path = parquet(tmp_path / "law.parquet", {"text": texts}, use_dictionary=False, row_group_size=1000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = b"\xff" * 4000
    assert "damaged after row" in error_of("parquet", written(path, bytes(content)))


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_pyarrow(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert 'pip install "expertctl[parquet]"' in error_of("parquet", tmp_path / "law.parquet")


@pytest.mark.parametrize("row_group_size", [500, 10_000])
def test_reading_parquet_does_not_hold_the_file(tmp_path: Path, row_group_size: int) -> None:
    pa = pytest.importorskip("pyarrow")
    texts = [f"{index} " * 1000 for index in range(10_000)]
    options = {"use_dictionary": False, "compression": "none", "row_group_size": row_group_size}
    path = parquet(tmp_path / "law.parquet", {"text": texts}, **options)
    start, peak = pa.total_allocated_bytes(), 0
    for _ in read_parquet(path, "text"):
        peak = max(peak, pa.total_allocated_bytes() - start)
    assert path.stat().st_size > 40_000_000
    assert peak < 15_000_000


# --- every format ---


@pytest.mark.parametrize("name", ["jsonl", "text", "parquet"])
def test_a_file_that_is_not_there_is_the_users_to_mend(tmp_path: Path, name: str) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    assert "cannot be read (" in error_of(name, tmp_path / "missing")
