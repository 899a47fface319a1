"""Near-duplicates are dropped by one rule: more than half of the 8-word shingles seen before."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from expertctl.experts.text.bundled import drop_near_duplicates

DOCUMENTS = st.lists(st.lists(st.sampled_from("abcd"), max_size=30).map(" ".join), max_size=12)


def words(start: int, stop: int) -> str:
    return " ".join(f"w{index}" for index in range(start, stop))


def kept(*texts: str) -> list[str]:
    return [text for _, text in drop_near_duplicates((str(index), text) for index, text in enumerate(texts))]


def test_a_document_that_mostly_repeats_an_earlier_one_goes() -> None:
    first = words(0, 100)
    assert kept(first, first + " and a few words more") == [first]


def test_half_of_the_shingles_in_common_is_not_yet_a_duplicate() -> None:
    first = words(0, 17)  # 10 shingles
    half_of_20 = words(0, 27)
    half_of_18 = words(0, 25)  # 10 of 18 are old: more than half
    assert kept(first, half_of_20) == [first, half_of_20]
    assert kept(first, half_of_18) == [first]


def test_a_document_made_of_pieces_of_several_earlier_ones_goes() -> None:
    first, second = words(0, 50), words(100, 150)
    assert kept(first, second, f"{words(10, 30)} {words(110, 130)}") == [first, second]


def test_layout_does_not_hide_a_duplicate() -> None:
    first = words(0, 20)
    assert kept(first, first.replace(" ", "\n    ")) == [first]


def test_short_documents_go_only_when_their_words_are_the_same() -> None:
    assert kept("one two three", "one two four", "one two", "one two three") == [
        "one two three",
        "one two four",
        "one two",
    ]


def test_dropped_documents_do_not_count_as_seen() -> None:
    first, mostly_first, rest = words(0, 60), words(0, 90), words(62, 90)
    assert kept(first, mostly_first, rest) == [first, rest]


def test_keys_travel_with_their_texts() -> None:
    assert list(drop_near_duplicates([("a", "x"), ("b", "x"), ("c", "y")])) == [("a", "x"), ("c", "y")]


def test_documents_are_taken_one_at_a_time() -> None:
    def documents() -> object:
        yield "a", "x"
        raise AssertionError("read ahead")

    assert next(iter(drop_near_duplicates(documents()))) == ("a", "x")  # type: ignore[arg-type]


def test_the_choice_is_the_same_in_processes_with_other_hash_seeds() -> None:
    code = (
        "from expertctl.experts.text.bundled import _stable_hash;"
        "print(_stable_hash('one two three four five six seven eight'))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@given(DOCUMENTS)
def test_kept_documents_are_a_subsequence_without_repeats(texts: list[str]) -> None:
    remaining = iter(texts)
    result = kept(*texts)
    assert all(text in remaining for text in result)
    assert len(set(result)) == len(result)


@given(DOCUMENTS)
def test_dropping_twice_drops_no_more(texts: list[str]) -> None:
    assert kept(*kept(*texts)) == kept(*texts)


@given(DOCUMENTS, DOCUMENTS)
def test_later_documents_do_not_change_earlier_choices(texts: list[str], more: list[str]) -> None:
    before = kept(*texts)
    assert kept(*texts, *more)[: len(before)] == before
