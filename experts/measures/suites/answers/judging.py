"""Shares of right answers and passing programs: one of k samples, estimated without bias (arXiv:2107.03374, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from .....core.errors import UserError
from .....core.reporting import SILENT, Reporter
from ..intervals import Interval, mean_difference, paired, share_interval
from ..opening import DEFAULT_SETTINGS, CheckedModels, ModelSettings
from ..skills import SkillTable, skill_table
from .prompts import Prompt, read_prompts
from .running_code import run_programs
from .writing import Writing, write

TRIES = (1, 10, 100)
KINDS = ("match", "pass")
"""Prompts with answers, and prompts with tests."""


@dataclass(frozen=True)
class AnswerSettings:
    """Which prompts are continued, and how."""

    file: Path
    writing: Writing
    run_code: bool = False
    """Whether programs that models write may be run."""


@dataclass(frozen=True)
class AnswerTable:
    """What models wrote, and what of it is right."""

    prompts: Sequence[Prompt]
    samples: int
    written: Mapping[str, Sequence[Sequence[str]]]
    """Model -> for each prompt its samples."""
    right: Mapping[str, Sequence[Sequence[bool]]]
    """Model -> for each prompt whether each sample is right."""

    @property
    def metrics(self) -> list[tuple[str, int]]:
        """Kinds of prompts that there are, each with the numbers of tries that are reported."""
        there = ["pass" if prompt.tests is not None else "match" for prompt in self.prompts]
        tries = sorted({count for count in (*TRIES, self.samples) if count <= self.samples})
        return [(kind, count) for kind in KINDS if kind in there for count in tries]

    def estimates(self, model: str, kind: str, tries: int) -> list[float]:
        """Return for each prompt of a kind the probability that one of so many samples is right."""
        return [
            pass_at(len(right), sum(right), tries)
            for prompt, right in zip(self.prompts, self.right[model], strict=True)
            if (prompt.tests is not None) == (kind == "pass")
        ]

    def rate(self, model: str, kind: str, tries: int) -> Interval:
        """Return the mean of the estimates with its bootstrap interval over prompts."""
        return share_interval(self.estimates(model, kind, tries))

    def differences(self, kind: str, tries: int) -> list[tuple[str, str, Interval]]:
        """Return (model, other, rate of the model minus that of the other) for every two models, paired by prompt."""
        values = {model: self.estimates(model, kind, tries) for model in self.right}
        return paired(list(values), lambda model, other: mean_difference(values[model], values[other]))

    def skills(self, model: str) -> SkillTable | None:
        """Return the share of right samples on each skill and pair of skills; None if no prompt is tagged."""
        shares = [sum(right) / len(right) for right in self.right[model]]
        return skill_table([prompt.skills for prompt in self.prompts], shares)

    def as_json(self) -> dict[str, Any]:
        """Return the content of `eval --generate --json`."""
        models: dict[str, dict[str, Any]] = {
            model: {
                "rates": {f"{kind}@{tries}": self.rate(model, kind, tries).as_json() for kind, tries in self.metrics},
                "answers": [
                    {"where": prompt.where, "samples": list(texts), "right": list(right)}
                    for prompt, texts, right in zip(self.prompts, self.written[model], self.right[model], strict=True)
                ],
            }
            for model in self.right
        }
        for model, content in models.items():
            table = self.skills(model)
            content |= {} if table is None else {"skills": table.as_json()}
        differences = [
            {"model": model, "other": other, "metric": f"{kind}@{tries}", **difference.as_json()}
            for kind, tries in self.metrics
            for model, other, difference in self.differences(kind, tries)
        ]
        return {"prompts": len(self.prompts), "samples": self.samples, "models": models, "differences": differences}


def pass_at(samples: int, right: int, tries: int) -> float:
    """Return the unbiased estimate that at least one of `tries` samples is right, from `right` of `samples`.

    1 - C(n - c, k) / C(n, k): the share of subsets of k samples that have a right one; exact in whole numbers.
    """
    if not 0 <= right <= samples or not 1 <= tries <= samples:
        raise ValueError(f"{tries} of {samples} samples with {right} right")
    return 1 - comb(samples - right, tries) / comb(samples, tries)


def evaluate_answers(
    folders: Mapping[str, Path],
    settings: AnswerSettings,
    model_settings: ModelSettings = DEFAULT_SETTINGS,
    reporter: Reporter = SILENT,
) -> AnswerTable:
    """Let models (name -> folder) continue prompts; raises `UserError` for a bad file or model before any is loaded."""
    prompts = read_prompts(settings.file, run_code=settings.run_code)
    models = CheckedModels.of(folders, model_settings, scored=False)
    if (
        models.decoder is not None
        and models.decoder.decoder.choose is not None
        and not settings.writing.sampling.temperature
    ):
        raise UserError(
            f"decoder '{models.decoder.decoder.name}' chooses among samples, which are equal at temperature 0; give --temperature"
        )
    tokens: dict[str, list[list[int]]] = {}
    for name in folders:
        encoder = models.encoder(name)
        encoded = encoder.encode([prompt.text for prompt in prompts])
        tokens[name] = [[*encoder.begin_of_text, *ids] for ids in encoded]
        for prompt, ids in zip(prompts, tokens[name], strict=True):
            length = len(ids) + settings.writing.max_new_tokens
            models.require_positions(name, length, prompt.where, "--max-new-tokens")
    written = {
        opened.name: write(opened, prompts, tokens[opened.name], settings.writing, reporter)
        for opened in models.opened(reporter)
    }
    right = {name: _judge(prompts, texts, reporter) for name, texts in written.items()}
    return AnswerTable(prompts, settings.writing.samples, written, right)


def _judge(prompts: Sequence[Prompt], written: Sequence[Sequence[str]], reporter: Reporter) -> list[list[bool]]:
    programs = [
        prompt.program(text)
        for prompt, texts in zip(prompts, written, strict=True)
        if prompt.tests is not None
        for text in texts
    ]
    passed = iter(run_programs(programs, reporter=reporter)) if programs else iter(())
    return [
        [next(passed) if prompt.tests is not None else prompt.is_match(text) for text in texts]
        for prompt, texts in zip(prompts, written, strict=True)
    ]
