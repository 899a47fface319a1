"""Words of many texts at once are those that scikit-learn finds in each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer

from expertctl.core.text.clustering.words import NUMBER, hash_of, is_mostly_unspaced, words_of

ANALYSER = CountVectorizer().build_analyzer()


@given(st.lists(st.text(max_size=60), max_size=6))
@settings(deadline=None)
def test_words_are_those_of_scikit_learn(texts: list[str]) -> None:
    words = words_of(texts)
    spelled = [(int(text), words.spelling(number)) for number, text in enumerate(words.texts)]
    assert spelled == [(number, word) for number, text in enumerate(texts) for word in ANALYSER(text)]


def test_equal_words_have_equal_hashes_and_others_do_not() -> None:
    text = " ".join(f"word{number} a{number}b" for number in range(20_000)) + " Word7 word7"
    words = words_of([text])
    spelled = [words.spelling(number) for number in range(len(words.hashes))]
    assert len(set(words.hashes.tolist())) == len(set(spelled))
    assert words.hashes[-1] == words.hashes[-2] == hash_of("word7")


def test_a_words_hash_does_not_depend_on_its_neighbours() -> None:
    assert words_of(["to be, or not"]).hashes[1] == words_of(["x y z", "be"]).hashes[0] == hash_of("be")


def test_numbers_are_one_word() -> None:
    words = words_of(["in 1984 and 3rd or v2"])
    number = hash_of(NUMBER)
    assert [words.spelling(place) for place in np.flatnonzero(words.hashes == number)] == ["1984", "3rd"]


def test_runs_of_letters_stay_within_words() -> None:
    words = words_of(["白日依山，盡", "ab"], "characters")
    spelled = [words.spelling(number) for number in range(len(words.hashes))]
    assert sorted(spelled) == sorted(["白日", "日依", "依山", "白日依", "日依山", "ab"])
    assert words.texts.tolist() == [0] * 5 + [1]


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("床前明月光，疑是地上霜。", True),
        ("吾輩は猫である。名前はまだ無い。", True),
        ("ฉันรักเธอ", True),
        ("the quick brown fox", False),
        ("Im Anfang war das Wort und 太初有道", False),
        ("Быстрая лиса", False),
        ("", False),
    ],
)
def test_scripts_without_spaces_are_noticed(text: str, fails: bool) -> None:
    assert is_mostly_unspaced([text]) is fails


def test_nothing_gives_nothing() -> None:
    for texts in ([], [""], ["a", "-", "\n"]):
        assert words_of(texts).hashes.size == 0
        assert words_of(texts, "characters").hashes.size == 0
