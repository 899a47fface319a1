"""Text of tokens as they arrive."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertctl.core.models.serving.text_stream import Decode, StopFinder, TextStream, decoder_of
from expertctl.core.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def decode(model_folder: Path) -> Decode:
    return decoder_of(load_tokenizer(model_folder))


@pytest.mark.parametrize("text", ["Größe, façade, 東京 🙂 end", "plain", "  spaces \n\n and lines"])
def test_pieces_make_up_the_text(model_folder: Path, decode: Decode, text: str) -> None:
    ids = load_tokenizer(model_folder)(text)["input_ids"]
    for begin in range(min(3, len(ids))):
        stream = TextStream(decode, ids[:begin])
        pieces = [stream.push(token) for token in ids[begin:]]
        assert not any("�" in piece for piece in pieces if begin == 0)
        assert decode(ids[:begin]).rstrip("�") + "".join(pieces) == text or begin > 0
        if begin == 0:
            assert "".join(pieces) + stream.finish() == text


def test_half_a_character_comes_at_the_end(model_folder: Path, decode: Decode) -> None:
    ids = load_tokenizer(model_folder)("東")["input_ids"]
    stream = TextStream(decode, [])
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == "�"


def test_bytes_that_never_become_text_do_not_pile_up(model_folder: Path, decode: Decode) -> None:
    byte = load_tokenizer(model_folder)("東")["input_ids"][-1]
    stream = TextStream(decode, [])
    pieces = [stream.push(byte) for _ in range(100)]
    assert len(stream._window) < 16
    assert "".join(pieces).startswith("�")


@settings(max_examples=200)
@given(st.lists(st.text("abc", max_size=3), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_text_before_the_first_stop_text(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    got = ""
    for piece in pieces:
        got += finder.push(piece)
        if finder.found:
            break
    got += finder.finish()
    text = "".join(pieces)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert finder.found == bool(places)
    if not places:
        assert got == text
    else:  # a shorter stop text may end before a longer one that began earlier
        assert text.startswith(got)
        assert not any(stop in got for stop in stops)
        assert any(text[len(got) :].startswith(stop) for stop in stops)
