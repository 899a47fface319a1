"""Multiple choice: accuracy of models under each rule, with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....core.reporting import SILENT, Reporter
from .choice_scores import RULES, credit, question_pairs, score_questions
from .intervals import Interval, mean_difference, paired, share_interval
from .opening import DEFAULT_SETTINGS, CheckedModels, ModelSettings
from .questions import TEMPLATE, Question, ShotChoice, Template, choose_shots, read_questions
from .skills import SkillTable, skill_table


@dataclass(frozen=True)
class ChoiceSettings:
    """Which questions are asked, and how."""

    file: Path
    shots: int = 0
    """Number of solved examples before each question."""
    shots_from: Path | None = None
    """File with the examples; None: the questions' own file, without the question itself."""
    shots_by: ShotChoice = "order"
    template: str = TEMPLATE
    seed: int = 0
    """Of the order of the examples."""


@dataclass(frozen=True)
class ChoiceTable:
    """What models choose on the same questions."""

    questions: Sequence[Question]
    scores: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]
    """Model -> for each question: rule -> score of each choice."""
    shots: int = 0

    def credits(self, model: str, rule: str) -> list[float]:
        """Return for each question 1 if the model is right, 0 if not; a share where several choices score the same."""
        return [
            credit(scores[rule], question.answer)
            for scores, question in zip(self.scores[model], self.questions, strict=True)
        ]

    def accuracy(self, model: str, rule: str) -> Interval:
        """Return the share of right answers, with its bootstrap interval over questions."""
        return share_interval(self.credits(model, rule))

    def differences(self, rule: str) -> list[tuple[str, str, Interval]]:
        """Return (model, other, accuracy of the model minus that of the other) for every two models, paired by question."""
        credits = {model: self.credits(model, rule) for model in self.scores}
        return paired(list(credits), lambda model, other: mean_difference(credits[model], credits[other]))

    def skills(self, model: str, rule: str) -> SkillTable | None:
        """Return the accuracy on each skill and pair of skills; None if no question is tagged."""
        return skill_table([question.skills for question in self.questions], self.credits(model, rule))

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return sum(1 / len(question.choices) for question in self.questions) / len(self.questions)

    def as_json(self) -> dict[str, Any]:
        """Return the content of `eval --choices --json`."""
        models: dict[str, dict[str, Any]] = {
            model: {
                "accuracy": {rule: self.accuracy(model, rule).as_json() for rule in RULES},
                "chosen": {
                    rule: [max(range(len(own[rule])), key=own[rule].__getitem__) for own in scores] for rule in RULES
                },
            }
            for model, scores in self.scores.items()
        }
        for model, content in models.items():
            tables = {rule: table.as_json() for rule in RULES if (table := self.skills(model, rule)) is not None}
            content |= {"skills": tables} if tables else {}
        differences = [
            {"model": model, "other": other, "rule": rule, **difference.as_json()}
            for rule in RULES
            for model, other, difference in self.differences(rule)
        ]
        return {
            "questions": len(self.questions),
            "shots": self.shots,
            "chance": self.chance,
            "models": models,
            "differences": differences,
        }


def evaluate_choices(
    folders: Mapping[str, Path],
    settings: ChoiceSettings,
    model_settings: ModelSettings = DEFAULT_SETTINGS,
    reporter: Reporter = SILENT,
) -> ChoiceTable:
    """Let models (name -> folder) choose; raises `UserError` for a bad file, model or decoder before any is loaded."""
    template = Template.parse(settings.template)
    questions = read_questions(settings.file)
    examples = questions if settings.shots_from is None else read_questions(settings.shots_from)
    shots = choose_shots(questions, examples, settings.shots, seed=settings.seed, by=settings.shots_by)
    models = CheckedModels.of(folders, model_settings, scored=True)
    pairs = {}
    for name in folders:
        encoder = models.encoder(name)
        pairs[name] = [
            question_pairs(encoder, template, question, own) for question, own in zip(questions, shots, strict=True)
        ]
        for question, own in zip(questions, pairs[name], strict=True):
            models.require_positions(name, own.longest, question.where, "--shots")
    scores = {
        opened.name: score_questions(opened, questions, pairs[opened.name], reporter)
        for opened in models.opened(reporter)
    }
    return ChoiceTable(questions, scores, settings.shots)
