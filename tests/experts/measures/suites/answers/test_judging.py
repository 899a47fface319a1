"""Exact match and pass@k, from prompts in a file to the rates of models."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from expertctl import UserError, Workspace
from expertctl.core.models.generation import Sampling, generate
from expertctl.experts.measures.suites.answers.judging import AnswerTable, pass_at
from expertctl.experts.measures.suites.answers.prompts import Prompt, normal, read_prompts, until_stop


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples: int) -> None:
    for right in range(samples + 1):
        values = [True] * right + [False] * (samples - right)
        for tries in range(1, samples + 1):
            subsets = list(combinations(values, tries))
            assert pass_at(samples, right, tries) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_samples_is_the_papers_product() -> None:
    for right in (0, 1, 37, 199, 200):
        product = 1.0
        for number in range(200 - right + 1, 201):
            product *= 1 - 100 / number
        expected = 1.0 if 200 - right < 100 else 1 - product
        assert pass_at(200, right, 100) == pytest.approx(expected)
    with pytest.raises(ValueError, match="3 of 2 samples"):
        pass_at(2, 0, 3)


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("Paris", " paris. ", True),
        ("two  words\n", "Two words", True),
        ("ﬁne", "fine", True),
        ("Straße", "STRASSE", True),
        ("the cat", "cat", False),
        ("café", "cafe", False),
        ("3.14", "314", False),
        ("-5", "5", False),
        ("a,b", "ab", False),
    ],
)
def test_answers_are_compared_in_their_normal_form(left: str, right: str, equal: bool) -> None:
    assert (normal(left) == normal(right)) is equal


def test_an_answer_ends_before_the_first_stop() -> None:
    assert until_stop("a b\nc\n\nd", ("\n\n", "\n")) == "a b"
    assert until_stop("a b", ("\n",)) == "a b"
    assert until_stop("a b", ()) == "a b"
    prompt = Prompt("Q", ("yes",), None, ("\n",), (), "here")
    assert prompt.is_match(" Yes.\nNo.")
    assert not prompt.is_match(" Yes or no")
    code = Prompt("def f():\n", (), "assert f() == 1", ("\ndef",), (), "here")
    assert code.program("    return 1\ndef g(): 0") == "def f():\n    return 1\nassert f() == 1\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "a"}, "'prompt' is missing"),
        ({"prompt": "a"}, "neither of 'answer' and 'tests'"),
        ({"prompt": "a", "answer": "b", "tests": "c"}, "both of 'answer' and 'tests'"),
        ({"prompt": "a", "answer": []}, "'answer' is an empty list"),
        ({"prompt": "a", "answer": ["b", 3]}, "'answer' is a number, not text"),
        ({"prompt": "a", "answer": "?"}, "consists of .,;:!? only"),
        ({"prompt": "a", "answer": "b", "stop": "x"}, "'stop' is text"),
        ({"prompt": "a", "answer": "b", "stop": [""]}, "'stop' is a list, or has other than texts"),
        ({"prompt": "a", "tests": ""}, "'tests' is empty"),
        ({"prompt": "a", "tests": "assert f()"}, "which needs --run-code"),
    ],
)
def test_a_bad_prompt_is_one_error_with_its_line(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + json.dumps(record))
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / "p.jsonl", run_code=False)
    assert str(error.value).startswith(f"{tmp_path / 'p.jsonl'}:2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def prompts(shared_workspace: Path, tmp_path: Path) -> Path:
    """Prompts of which the model answers one right, and a program that is right whatever it writes in a comment."""
    written = generate(shared_workspace / "seed", "It says", Sampling(8, temperature=0, stop=("\n",))).text
    records = [
        {"prompt": "It says", "answer": ["other", until_stop(written, ("\n",))]},
        {"prompt": "They say", "answer": "nothing of the kind"},
        {"prompt": "def one():\n    return 1  #", "tests": "assert one() == 1", "stop": ["\n", "\r"]},
        {"prompt": "def one():\n    return 2  #", "tests": "assert one() == 1", "stop": ["\n", "\r"]},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path / "prompts.jsonl"


def test_greedy_answers_are_those_of_generate(shared_workspace: Path, prompts: Path) -> None:
    table = Workspace(shared_workspace).suites.answers(prompts, "seed", "law", max_new_tokens=8, run_code=True)
    assert table.metrics == [("match", 1), ("pass", 1)]
    assert table.estimates("seed", "match", 1) == [1.0, 0.0]
    assert table.estimates("seed", "pass", 1) == [1.0, 0.0]
    alone = generate(shared_workspace / "seed", "They say", Sampling(8, temperature=0, stop=("\n",))).text
    assert table.written["seed"][1] == [alone]
    ((model, other, difference),) = table.differences("pass", 1)
    assert (model, other, difference.value) == ("law", "seed", 0.0)


def test_samples_differ_and_the_same_seed_gives_them_again(shared_workspace: Path, prompts: Path) -> None:
    suites = Workspace(shared_workspace).suites

    def written(seed: int) -> list[list[str]]:
        table = suites.answers(prompts, "seed", samples=3, max_new_tokens=6, seed=seed, run_code=True)
        assert table.metrics == [("match", 1), ("match", 3), ("pass", 1), ("pass", 3)]
        return [list(texts) for texts in table.written["seed"]]

    first = written(0)
    assert len(set(first[1])) > 1
    assert first == written(0)
    assert first != written(1)


def test_rates_come_from_the_samples() -> None:
    prompts = [Prompt("Q", ("yes",), None, (), (), "here")] * 2
    written = {"a": [["yes", "no", "no"], ["no"] * 3]}
    right = {"a": [[True, False, False], [False] * 3]}
    table = AnswerTable(prompts, 3, written, right)
    assert table.rate("a", "match", 1).value == pytest.approx(1 / 6)
    assert table.rate("a", "match", 3).value == pytest.approx(1 / 2)
    assert table.as_json()["models"]["a"]["rates"]["match@3"]["value"] == pytest.approx(1 / 2)


def test_what_does_not_fit_is_refused_before_any_work(
    shared_workspace: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertctl.experts.measures.suites import opening

    suites = Workspace(shared_workspace).suites
    monkeypatch.setattr(opening, "load_network", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: \d+ tokens .* and seed has 128 positions"):
        suites.answers(prompts, "seed", max_new_tokens=200, run_code=True)
    with pytest.raises(UserError, match=r"prompts\.jsonl:3: its tests run a program .*--run-code"):
        suites.answers(prompts, "seed")
    with pytest.raises(UserError, match="equal at temperature 0; give --temperature"):
        suites.answers(prompts, "seed", decoder="best_of", run_code=True)
