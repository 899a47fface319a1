"""Corpus formats: JSON lines, plain text, Parquet.

Every reader streams, skips texts that are empty or only white space, and raises `UserError` with the file and the
line, row or byte where reading failed.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.text import CorpusFormat, Document

PARQUET_ROWS_AT_A_TIME = 256
PARQUET_BUFFER_BYTES = 1 << 20
TEXT_DOCUMENT_BYTES = 4 << 20  # larger text files are split into several documents
# where to split, in order of preference: after a paragraph, a line, a word
TEXT_BORDERS = ((b"\n\n", b"\n\r\n"), (b"\n",), (b" ",))
SET_TEXT_FIELD = "; set text_field to the one with the text"
MAX_QUOTED = 200  # characters quoted from a file in an error message
JSON_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}


@hookimpl
def corpus_formats() -> list[CorpusFormat]:
    """Return the built-in corpus formats."""
    return [
        CorpusFormat(
            "jsonl",
            "one JSON object per line with the text in one field",
            (".jsonl", ".jsonl.gz"),
            read_jsonl,
            read_jsonl_values,
        ),
        CorpusFormat("text", "one document per file; large files are split", (".txt", ".md"), read_text),
        CorpusFormat(
            "parquet",
            "one document per row with the text in one column",
            (".parquet",),
            read_parquet,
            read_parquet_values,
        ),
    ]


def read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    """Yield the text of each line of a `.jsonl` or `.jsonl.gz` file; blank lines are skipped."""
    for document in read_jsonl_values(path, text_field, None):
        yield document.text


def read_jsonl_values(path: Path, text_field: str, field: str | None) -> Iterator[Document]:
    """Yield the documents of `read_jsonl`, each with the value of another field."""
    for number, line in _numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = _record_of_line(line, text_field, where)
        if text_field not in record:
            raise _no_field("field", text_field, list(record), where, SET_TEXT_FIELD)
        text = _checked_text(record[text_field], text_field, where)
        if not text.strip():
            continue
        if field is not None and field not in record:
            raise _no_field("field", field, list(record), where)
        yield Document(text, None if field is None else _checked_value(record[field], field, where))


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each record of a JSON lines or Parquet file with where it stands; blank lines are skipped."""
    if path.suffix == ".parquet":
        for number, row in _parquet_rows(path, lambda schema: schema.names):
            yield f"{path}: row {number}", row
        return
    for number, line in _numbered_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _record_of_line(line, "messages", where)


def read_text(path: Path, text_field: str) -> Iterator[str]:
    """Yield a file as one document; a file above `TEXT_DOCUMENT_BYTES` is split between paragraphs.

    The documents together are the text of the file. `text_field` is unused.
    """
    offset = 0
    for piece in _text_pieces(path):
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not UTF-8 at byte offset {offset + error.start}; save the file as UTF-8"
            ) from error
        text = text if offset else text.removeprefix("\ufeff")
        offset += len(piece)
        if text.strip():
            yield text


def read_parquet(path: Path, text_field: str) -> Iterator[str]:
    """Yield the text column of a Parquet file, with a few rows in memory at a time."""
    for document in read_parquet_values(path, text_field, None):
        yield document.text


def read_parquet_values(path: Path, text_field: str, field: str | None) -> Iterator[Document]:
    """Yield the documents of `read_parquet`, each with the value of another column."""

    def columns(schema: Any) -> Sequence[str]:
        _check_column(schema, text_field, path)
        if field is not None and field not in schema.names:
            raise _no_field("field", field, schema.names, str(path))
        return [text_field] if field in (None, text_field) else [text_field, str(field)]

    for row, cells in _parquet_rows(path, columns):
        where = f"{path}: row {row}"
        text = _checked_text(cells[text_field], text_field, where)
        if text.strip():
            yield Document(text, None if field is None else _checked_value(cells[field], field, where))


def _parquet_rows(path: Path, columns: Callable[[Any], Sequence[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, column -> value) of each row; `columns(schema)` names the columns to read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f'{path}: reading Parquet needs pyarrow; install it with: pip install "expertctl[parquet]"'
        ) from error

    row, name = 0, ""
    try:
        # by default pyarrow prefetches all chunks of the column into memory
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES) as file:
            names = columns(file.schema_arrow)
            for batch in file.iter_batches(PARQUET_ROWS_AT_A_TIME, columns=list(names)):
                for cells in zip(*(batch.column(name) for name in names), strict=True):
                    row += 1
                    values = {}
                    for name, cell in zip(names, cells, strict=True):
                        values[name] = cell.as_py()
                    yield row, values
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: row {row}: '{name}' is not UTF-8; write the file again as UTF-8") from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # raised by the system: pyarrow's own have no errno
            raise _unreadable(path, error) from error
        raise UserError(
            f"{path}: not a Parquet file, or damaged after row {row} ({_quoted(error)}); copy or write it again"
        ) from error


# --- splitting plain text ---


def _text_pieces(path: Path) -> Iterator[bytes]:
    """Stream a file's bytes in pieces of at most `TEXT_DOCUMENT_BYTES`."""
    remainder = b""
    try:
        with path.open("rb") as stream:
            while True:
                window = remainder + stream.read(TEXT_DOCUMENT_BYTES + 1 - len(remainder))
                if len(window) <= TEXT_DOCUMENT_BYTES:
                    break
                cut = _split_point(window, TEXT_DOCUMENT_BYTES)
                yield window[:cut]
                remainder = window[cut:]
    except OSError as error:
        raise _unreadable(path, error) from error
    if window:
        yield window


def _split_point(window: bytes, end: int) -> int:
    """Return the split point at or before `end`: after the last paragraph, line or word, else between characters."""
    for borders in TEXT_BORDERS:
        ends = [begin + len(border) for border in borders if (begin := window.rfind(border, 0, end)) >= 0]
        if ends:
            return max(ends)
    cut = end
    while cut > end - 3 and window[cut] & 0xC0 == 0x80:  # inside a multi-byte character
        cut -= 1
    return cut


# --- reading lines and fields ---


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of a file without its byte-order mark; `.gz` files are decompressed."""
    number = 0
    try:
        is_compressed = path.name.lower().endswith(".gz")
        with cast(BinaryIO, gzip.open(path)) if is_compressed else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}:{number + 1}: the gzip data is truncated or damaged ({_quoted(error)}); copy or compress it again"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _record_of_line(line: bytes, text_field: str, where: str) -> dict[str, Any]:
    try:
        # without the line end, so that an error at the end is reported in the right column
        record = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise _bad_json(where, f"{error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # such as an oversized number or unbounded nesting
        raise _bad_json(where, _quoted(error)) from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: {_kind(record)}, not an object; write each line as {{{json.dumps(text_field)}: …}}")
    return record


def _checked_value(value: object, field: str, where: str) -> str:
    """Return a string, number or boolean as text in JSON's notation, strings without quotes."""
    if not isinstance(value, str | int | float):
        raise UserError(
            f"{where}: '{field}' is {_kind(value)}, which cannot name a domain; fix or remove it, or use another field"
        )
    return value if isinstance(value, str) else json.dumps(value)


def _checked_text(value: object, text_field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: '{text_field}' is {_kind(value)}, not a string; fix or remove it, or set text_field to another "
            "field"
        )
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can escape a lone surrogate: "\ud83d"
            raise UserError(
                f"{where}: '{text_field}' has a lone surrogate (half a character) at position {error.start}; "
                "fix or remove it"
            ) from error
    return value


def _check_column(schema: Any, text_field: str, path: Path) -> None:
    """Raise `UserError` unless the Parquet schema has exactly one text column of that name."""
    import pyarrow.types as kinds

    if schema.names.count(text_field) != 1:
        raise _no_field("column", text_field, schema.names, str(path), SET_TEXT_FIELD)
    kind = schema.field(text_field).type
    plain = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(plain) or kinds.is_large_string(plain) or kinds.is_string_view(plain)):
        raise UserError(f"{path}: column '{text_field}' holds {kind}, not strings; set text_field to another column")


# --- error messages ---


def _no_field(what: str, name: str, known: list[str], where: str, remedy: str = "") -> UserError:
    choices = _quoted(", ".join(known)) if known else "none"
    return UserError(f"{where}: no {what} '{name}'; {what}s: {choices}{remedy}")


def _bad_json(where: str, reason: str) -> UserError:
    return UserError(f"{where}: not valid JSON ({reason}); each line must be one complete JSON object")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({_quoted(error.strerror or error)}); check the path and its permissions")


def _kind(value: object) -> str:
    """Return the JSON type of a value with its article."""
    return "null" if value is None else JSON_KINDS.get(type(value), f"a {type(value).__name__}")


def _quoted(words: object) -> str:
    """Quote text from a library or a file on one line of limited length."""
    line = " ".join(str(words).split())
    return line if len(line) <= MAX_QUOTED else f"{line[:MAX_QUOTED]}…"
