"""Multiple choice against a loop over tokens in float64, and the rules of few-shot prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_tokenizers import model as toy_model

from expertctl import UserError, Workspace, load_model
from expertctl.core.text.tokenizer import TextEncoder
from expertctl.experts.measures.suites.choice_scores import RULES, credit, rule_scores
from expertctl.experts.measures.suites.questions import Question, Template, choose_shots
from expertctl.experts.measures.suites.token_borders import split_texts

QUESTIONS: list[dict[str, Any]] = [
    {"question": "What does the function return?", "choices": ["a list", "a string of é", "nothing"], "answer": 1},
    {"question": "One and one make", "choices": ["two", "three"], "answer": "two"},
    {"question": "Is text wrapped?", "choices": ["yes, at the width", "no"], "answer": 0},
    {"question": "Who wrapped it?", "choices": ["Nobody", "The TextWrapper did", "I", "you"], "answer": 3},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    return path


def log_prob(model: Any, tokenizer: Any, prefix: str, target: str) -> float:
    """Return log p(target | prefix) of one text, token by token in float64, for a border that no token crosses."""
    whole = tokenizer(prefix + target)["input_ids"]
    border = len(tokenizer(prefix)["input_ids"])
    assert whole[:border] == tokenizer(prefix)["input_ids"], "the border is one of tokens"
    if not prefix:
        whole, border = [tokenizer.eos_token_id, *whole], 1
    logits_TV = model(input_ids=torch.tensor([whole])).logits[0].double()
    total = 0.0
    for place in range(border, len(whole)):
        total += float(logits_TV[place - 1, whole[place]]) - float(logits_TV[place - 1].logsumexp(dim=0))
    return total


def naive_scores(folder: Path, shots: int = 0, order: list[list[Question]] | None = None) -> list[dict[str, Any]]:
    """Return rule -> scores for each question, by the definitions of the rules."""
    model, tokenizer = load_model(folder, dtype="float64")
    found = []
    with torch.inference_mode():
        for number, question in enumerate(QUESTIONS):
            done = order[number] if order else []
            before = "".join(f"Question: {shot.text}\nAnswer: {shot.choices[shot.answer]}\n\n" for shot in done)
            channel = "".join(f"Answer: {shot.choices[shot.answer]}\nQuestion: {shot.text}\n\n" for shot in done)
            prompt = f"{before}Question: {question['question']}\nAnswer:"
            direct = [log_prob(model, tokenizer, prompt, f" {choice}") for choice in question["choices"]]
            neutral = [log_prob(model, tokenizer, "Answer:", f" {choice}") for choice in question["choices"]]
            found.append(
                {
                    "direct": direct,
                    "length": [
                        value / len(choice.encode("utf-8"))
                        for value, choice in zip(direct, question["choices"], strict=True)
                    ],
                    "unconditional": [value - other for value, other in zip(direct, neutral, strict=True)],
                    "channel": [
                        log_prob(model, tokenizer, f"{channel}Answer: {choice}\nQuestion:", f" {question['question']}")
                        for choice in question["choices"]
                    ],
                }
            )
    return found


@pytest.mark.parametrize("shots", [0, 1])
def test_every_rule_gives_what_a_loop_over_tokens_gives(shared_workspace: Path, file: Path, shots: int) -> None:
    workspace = Workspace(shared_workspace)
    table = workspace.suites.choices(file, "law", "seed", shots=shots)
    order = choose_shots(table.questions, table.questions, shots)
    for name in ("law", "seed")[: 2 - shots]:
        expected = naive_scores(workspace.layout.artefact(name), shots, order)
        for scores, own in zip(table.scores[name], expected, strict=True):
            assert set(scores) == set(RULES)
            for rule in RULES:
                assert scores[rule] == pytest.approx(own[rule], abs=2e-4), (name, rule)


def test_texts_are_scored_the_same_alone_as_in_batches(shared_workspace: Path, file: Path, tmp_path: Path) -> None:
    workspace = Workspace(shared_workspace)
    together = workspace.suites.choices(file, "law").scores["law"]
    for number, record in enumerate(QUESTIONS):
        (tmp_path / "one.jsonl").write_text(json.dumps(record), encoding="utf-8")
        (alone,) = workspace.suites.choices(tmp_path / "one.jsonl", "law").scores["law"]
        for rule in RULES:
            assert alone[rule] == pytest.approx(together[number][rule], abs=1e-4)


def test_a_question_alone_is_a_template_without_labels(shared_workspace: Path, file: Path) -> None:
    workspace = Workspace(shared_workspace)
    table = workspace.suites.choices(file, "law", template="{question}")
    model, tokenizer = load_model(workspace.layout.artefact("law"), dtype="float64")
    scores, question = table.scores["law"][1], QUESTIONS[1]
    with torch.inference_mode():
        direct = [log_prob(model, tokenizer, question["question"], f" {choice}") for choice in question["choices"]]
        alone = [log_prob(model, tokenizer, "", choice) for choice in question["choices"]]
    assert scores["direct"] == pytest.approx(direct, abs=2e-4)
    assert scores["unconditional"] == pytest.approx(
        [value - other for value, other in zip(direct, alone, strict=True)], abs=2e-4
    )


def test_a_token_across_the_border_is_scored_for_every_choice(tmp_path: Path) -> None:
    encoder = TextEncoder.of_folder(_with_end(toy_model(tmp_path / "toy", 0, added=["law of"], rows=70)))
    alone, crossed = encoder.encode(["the law", "the law of"])
    assert crossed[: len(alone)] != alone, "the toy tokenizer has a token across the border"
    first, second = split_texts(encoder, ["the law", "the law"], [" the", " of"])
    assert first[0] == second[0] == encoder.encode(["the"])[0]
    assert first[1] == encoder.encode(["law the"])[0]
    assert second[1] == encoder.encode(["law of"])[0]
    first, second = split_texts(encoder, ["law", "law"], [" the", " of"])
    assert first[0] == second[0] == [encoder.separator], "a prefix that has become empty"


def _with_end(folder: Path) -> Path:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<unk>"}))
    return folder


def test_accuracy_counts_right_answers_and_shares_equal_ones(shared_workspace: Path, file: Path) -> None:
    table = Workspace(shared_workspace).suites.choices(file, "law", "seed")
    for rule in RULES:
        right = [
            max(range(len(scores[rule])), key=scores[rule].__getitem__) == question.answer
            for scores, question in zip(table.scores["law"], table.questions, strict=True)
        ]
        assert table.credits("law", rule) == [float(value) for value in right]
        assert table.accuracy("law", rule).value == sum(right) / len(right)
        ((model, other, difference),) = table.differences(rule)
        assert (model, other) == ("seed", "law")
        own, others = table.accuracy("seed", rule).value, table.accuracy("law", rule).value
        assert difference.value == pytest.approx(own - others)
    assert credit([-1.0, -1.0, -2.0], 0) == 0.5
    assert credit([-math.inf] * 4, 3) == 0.25
    assert credit([-1.0, -2.0], 1) == 0


def test_an_impossible_choice_stays_impossible() -> None:
    scores = rule_scores(["a", "b"], [-math.inf, -1.0], [-math.inf, -2.0], [-1.0, -2.0])
    assert scores["unconditional"] == [-math.inf, 1.0]
    assert scores["length"] == [-math.inf, -1.0]


def question(text: str, where: str = "here") -> Question:
    return Question(text, ("yes", "no"), 0, (), where)


def test_shots_never_hold_the_question_itself() -> None:
    asked = [question(f"Question {number}") for number in range(6)] + [question(" question  3")]
    for seed in range(5):
        for own, shots in zip(asked, choose_shots(asked, asked, 4, seed=seed), strict=True):
            assert len(shots) == 4
            normal = " ".join(own.text.casefold().split())
            assert normal not in {" ".join(shot.text.casefold().split()) for shot in shots}
    with pytest.raises(UserError, match=r"here: 6 shots are requested, and 5 examples are not the question itself"):
        choose_shots(asked, asked, 6)


def test_shots_of_a_file_are_those_of_every_question(tmp_path: Path) -> None:
    asked, examples = [question("A"), question("B")], [question("C"), question("D"), question("E")]
    first, second = choose_shots(asked, examples, 2)
    assert first == second
    assert first != choose_shots(asked, examples, 2, seed=3)[0] or len(first) == 2
    assert choose_shots(asked, examples, 0) == [[], []]


def test_what_does_not_fit_is_refused_before_any_model_is_loaded(
    shared_workspace: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertctl.experts.measures.suites import opening

    monkeypatch.setattr(opening, "load_network", lambda *_, **__: pytest.fail("a model was loaded"))
    suites = Workspace(shared_workspace).suites
    with pytest.raises(
        UserError, match=r"questions\.jsonl:\d: \d+ tokens .* law has 128 positions; give fewer --shots"
    ):
        suites.choices(file, "law", shots=3)
    with pytest.raises(UserError, match="decoder 'best_of' cannot score text"):
        suites.choices(file, "law", decoder="best_of")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Question:", "has 0 places"),
        ("{question} {question}", "has 2 places"),
        ("Q: {question} A: ", "ends in white space"),
    ],
)
def test_a_template_without_a_question_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Template.parse(text)


def test_similar_examples_share_words_with_the_question_and_the_best_comes_last() -> None:
    examples = [question(text) for text in ("a red fox", "the green wood", "a red red fox runs", "blue", "A red FOX")]
    (shots,) = choose_shots([question("a red fox")], examples, 2, by="similarity")
    assert shots[-1].text == "a red red fox runs"
    assert all(shot.text.casefold() != "a red fox" for shot in shots)
    (shots,) = choose_shots([question("green wood")], examples, 1, by="similarity")
    assert [shot.text for shot in shots] == ["the green wood"]
    unknown = choose_shots([question("zebra")], examples, 3, by="similarity")[0]
    assert unknown == choose_shots([question("zebra")], examples, 3)[0][::-1], "the shuffled order fills up"
