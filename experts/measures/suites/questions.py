"""Multiple-choice questions in local files, and the prompts that they become.

A record has `question`, `choices` (a list of texts), `answer` (the index of the right choice from 0, or its text), and
may have `skills` (one or two names).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ....core.errors import UserError
from ....core.text.word_search import Words
from .records import Record, kind, read_records, require_text

TEMPLATE = "Question: {question}\nAnswer:"
PLACE = "{question}"
BETWEEN_SHOTS = "\n\n"
ShotChoice = Literal["order", "similarity"]
"""How examples are chosen: in one shuffled order, or by the words that they share with the question."""


@dataclass(frozen=True)
class Question:
    """A question with choices, of which one is right."""

    text: str
    choices: tuple[str, ...]
    """At least two different texts without white space around them."""
    answer: int
    """Index of the right choice."""
    skills: tuple[str, ...]
    """Names of the skills that it needs: none, one or two, sorted."""
    where: str
    """File and line."""


@dataclass(frozen=True)
class Template:
    """The text around a question: `before` it, and `after` it up to the answer, such as `Question: ` and `\\nAnswer:`.

    The noisy channel reads the same two labels in the other order: `Answer: CHOICE\\nQuestion: QUESTION`.
    """

    before: str
    after: str

    @classmethod
    def parse(cls, text: str) -> Template:
        """Return the template of a text with `{question}` in it; raises `UserError` if it is not there exactly once."""
        if text.count(PLACE) != 1:
            raise UserError(f"the template {text!r} has {text.count(PLACE)} places for {PLACE}; it needs exactly one")
        before, _, after = text.partition(PLACE)
        if after != after.rstrip():
            raise UserError(f"the template {text!r} ends in white space; the blank before a choice is added to it")
        return cls(before, after)

    def direct(self, question: Question, shots: Sequence[Question] = ()) -> str:
        """Return the prompt that a choice follows after a blank."""
        done = [f"{self._asked(shot)} {shot.choices[shot.answer]}" for shot in shots]
        return BETWEEN_SHOTS.join([*done, self._asked(question)])

    @property
    def neutral(self) -> str:
        """The prompt without a question, shots or line breaks before it, such as `Answer:`; may be empty."""
        return self.after.strip()

    def channel(self, question: Question, choice: str, shots: Sequence[Question] = ()) -> tuple[str, str]:
        """Return the prefix that ends in a choice, and the text of the question that follows."""
        label = self.before.rstrip()
        target = question.text if not label else f" {question.text}"
        done = [
            self._answered(shot.choices[shot.answer]) + label + (f" {shot.text}" if label else shot.text)
            for shot in shots
        ]
        return BETWEEN_SHOTS.join([*done, self._answered(choice) + label]), target

    def _asked(self, question: Question) -> str:
        return self.before + question.text + self.after

    def _answered(self, choice: str) -> str:
        return f"{self.neutral} {choice}\n" if self.neutral else f"{choice}\n"


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a JSON or JSON-lines file; raises `UserError` with file and line for a bad one."""
    return [_question(record) for record in read_records(path)]


def choose_shots(
    questions: Sequence[Question],
    examples: Sequence[Question],
    count: int,
    *,
    seed: int = 0,
    by: ShotChoice = "order",
) -> list[list[Question]]:
    """Return `count` solved examples for each question: in one shuffled order for all, or the most similar ones, the best last.

    Similarity is BM25 of the questions' words (arXiv:2101.06804 chooses by embeddings); the shuffled order fills up. An example with the text of the question itself is never among them, whatever its choices; case and white space do not
    count. Raises `UserError` if there are too few others.
    """
    order = random.Random(seed).sample(examples, len(examples)) if count else []
    words = Words.of(example.text for example in order) if by == "similarity" and count else None
    chosen = []
    for question in questions:
        candidates = order if words is None else _most_similar(words, question, order)
        own = _normal(question.text)
        usable: list[Question] = []
        for example in candidates:
            if len(usable) == count:
                break
            if _normal(example.text) != own:
                usable.append(example)
        if len(usable) < count:
            raise UserError(
                f"{question.where}: {count} shots are requested, and {len(usable)} examples are not the question itself; "
                "give fewer, or a file with more"
            )
        chosen.append(usable if words is None else usable[::-1])
    return chosen


def _most_similar(words: Words, question: Question, order: Sequence[Question]) -> list[Question]:
    """Return all examples, those that share words with a question first, by their scores."""
    found = [ranked.number for ranked in words.search([question.text], len(order))[0]]
    return [order[number] for number in dict.fromkeys((*found, *range(len(order))))]


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _question(record: Record) -> Question:
    where = record.where
    text = record.text("question").strip()
    listed = record.content.get("choices")
    if not isinstance(listed, list):
        raise UserError(f"{where}: 'choices' is {'missing' if listed is None else kind(listed)}; write a list of texts")
    if len(listed) < 2:
        raise UserError(f"{where}: {len(listed)} choice{'s' * (len(listed) != 1)}; a question needs at least two")
    choices = tuple(
        require_text(choice, f"{where}: choice {number}").strip() for number, choice in enumerate(listed, start=1)
    )
    if len(set(choices)) < len(choices):
        double = next(choice for choice in choices if choices.count(choice) > 1)
        raise UserError(f"{where}: the choice {double!r:.60} is there twice; remove one")
    return Question(text, choices, _answer(record, choices), skills_of(record), where)


def _answer(record: Record, choices: Sequence[str]) -> int:
    answer = record.content.get("answer")
    if answer is None:
        raise UserError(f"{record.where}: 'answer' is missing; give the index of the right choice from 0, or its text")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise UserError(f"{record.where}: answer {answer} is outside of the choices 0 to {len(choices) - 1}")
        return answer
    if not isinstance(answer, str):
        raise UserError(f"{record.where}: 'answer' is {kind(answer)}, not the index or the text of a choice")
    if answer.strip() not in choices:
        raise UserError(f"{record.where}: the answer {answer!r:.60} is none of the choices")
    return choices.index(answer.strip())


def skills_of(record: Record) -> tuple[str, ...]:
    """Return the skills that a record is tagged with, sorted; raises `UserError` unless they are one or two names."""
    tags = record.content.get("skills")
    if tags is None:
        return ()
    listed = [tags] if isinstance(tags, str) else tags
    if not isinstance(listed, list) or not all(isinstance(tag, str) and tag.strip() for tag in listed):
        raise UserError(f"{record.where}: 'skills' is neither a name nor a list of names")
    names = sorted({tag.strip() for tag in listed})
    if len(names) not in (1, 2):
        raise UserError(f"{record.where}: {len(names)} skills; a question is tagged with one or two")
    return tuple(names)
