"""Prompts in local files with what is expected of their continuations.

A record has `prompt`, and either `answer` (a text, or a list of texts that are all right) or `tests` (Python that raises an
error if the program before it is wrong). It may have `stop`: texts that end an answer.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from .....core.errors import UserError
from ..questions import skills_of
from ..records import Record, kind, read_records, require_text

STOP_ANSWER = ("\n",)
STOP_CODE = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Those of arXiv:2107.03374, section 2.2: what follows a function."""
END_MARKS = ".,;:!?"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and its right answers or the tests of its program."""

    text: str
    answers: tuple[str, ...]
    """Right answers, normalised; none for a program."""
    tests: str | None
    """Python after the program; None for an answer."""
    stop: tuple[str, ...]
    skills: tuple[str, ...]
    where: str
    """File and line."""

    def is_match(self, written: str) -> bool:
        """Return whether a continuation up to its stop is one of the answers."""
        return normal(until_stop(written, self.stop)) in self.answers

    def program(self, written: str) -> str:
        """Return the prompt with its continuation up to its stop, and the tests."""
        return f"{self.text}{until_stop(written, self.stop)}\n{self.tests}\n"


def normal(text: str) -> str:
    """Return the form in which answers are compared.

    Unicode NFKC, case folded, runs of white space as one blank, and no white space or `.,;:!?` at either end. Articles, inner
    punctuation and accents count.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(END_MARKS + " ")


def until_stop(text: str, stop: tuple[str, ...]) -> str:
    """Return what comes before the first of the stop texts."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places, default=len(text))]


def read_prompts(path: Path, *, run_code: bool) -> list[Prompt]:
    """Return the prompts of a JSON or JSON-lines file; raises `UserError` with file and line for a bad one.

    Tests of programs are refused unless `run_code`.
    """
    return [_prompt(record, run_code=run_code) for record in read_records(path)]


def _prompt(record: Record, *, run_code: bool) -> Prompt:
    where, content = record.where, record.content
    text = record.text("prompt")
    if ("answer" in content) == ("tests" in content):
        found = "both" if "answer" in content else "neither"
        raise UserError(f"{where}: {found} of 'answer' and 'tests'; a prompt has one of them")
    tests = None
    answers: tuple[str, ...] = ()
    if "tests" in content:
        tests = record.text("tests")
        if not run_code:
            raise UserError(
                f"{where}: its tests run a program that the model writes, which needs --run-code; that is a process with limits "
                "and no security boundary, so use a machine or container where it can do no harm"
            )
    else:
        answers = _answers(content["answer"], where)
    default = STOP_ANSWER if tests is None else STOP_CODE
    return Prompt(text, answers, tests, _stop(content.get("stop"), default, where), skills_of(record), where)


def _answers(value: object, where: str) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise UserError(f"{where}: 'answer' is an empty list")
    texts = [require_text(answer, f"{where}: 'answer'") for answer in listed]
    answers = tuple(dict.fromkeys(map(normal, texts)))
    if "" in answers:
        raise UserError(f"{where}: an answer consists of {END_MARKS} only, which do not count in comparisons")
    return answers


def _stop(value: object, default: tuple[str, ...], where: str) -> tuple[str, ...]:
    if value is None:
        return default
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise UserError(f"{where}: 'stop' is {kind(value)}, or has other than texts; write a list of texts")
    return tuple(value)
