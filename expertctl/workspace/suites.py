"""Questions with known answers, asked of models of a workspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertctl.core.errors import UserError
from expertctl.core.models.decoding.opening import DecoderChoice
from expertctl.core.reporting import SILENT, Reporter
from expertctl.experts.measures.suites.answers.judging import AnswerSettings, AnswerTable, evaluate_answers
from expertctl.experts.measures.suites.answers.writing import Writing
from expertctl.experts.measures.suites.choices import ChoiceSettings, ChoiceTable, evaluate_choices
from expertctl.experts.measures.suites.harness.running import HarnessSettings, HarnessTable, run_harness
from expertctl.experts.measures.suites.opening import ModelSettings
from expertctl.experts.measures.suites.questions import TEMPLATE, ShotChoice

from .project import Project

if TYPE_CHECKING:
    from expertctl.core.process.placement import DeviceMap


class Suites:
    """Evaluations by questions; models are names in the workspace or folders, by default all finished ones.

    All take `device_map` and `quantise` (see `load_model`) and a `decoder` with `decoder_options` (see `generate`).
    """

    def __init__(self, project: Project) -> None:
        self._project = project

    def choices(
        self,
        file: str | Path,
        *models: str,
        shots: int = 0,
        shots_from: str | Path | None = None,
        shots_by: ShotChoice = "order",
        template: str | None = None,
        device_map: DeviceMap | None = None,
        quantise: str | None = None,
        decoder: str | None = None,
        decoder_options: Mapping[str, Any] | None = None,
        reporter: Reporter = SILENT,
    ) -> ChoiceTable:
        """Ask multiple-choice questions of a file, after `shots` examples from `shots_from` (default: the file itself).

        `template` is the text around a question, with `{question}` in it and up to the answer.
        """
        examples = None if shots_from is None else Path(shots_from)
        settings = ChoiceSettings(Path(file), shots, examples, shots_by, TEMPLATE if template is None else template)
        return evaluate_choices(
            self._folders(models), settings, self._settings(device_map, quantise, decoder, decoder_options), reporter
        )

    def harness(
        self,
        tasks: Sequence[str],
        *models: str,
        folder: str | Path | None = None,
        download: bool = False,
        limit: int | None = None,
        device_map: DeviceMap | None = None,
        quantise: str | None = None,
        decoder: str | None = None,
        decoder_options: Mapping[str, Any] | None = None,
        reporter: Reporter = SILENT,
    ) -> HarnessTable:
        """Run tasks of lm-eval (names of tasks, groups or tags), of which `folder` may hold further ones.

        `download` lets tasks take their data from the Hugging Face hub; `limit` is the number of questions of each.
        """
        settings = HarnessSettings(tuple(tasks), None if folder is None else Path(folder), download, limit)
        return run_harness(
            self._folders(models), settings, self._settings(device_map, quantise, decoder, decoder_options), reporter
        )

    def answers(
        self,
        file: str | Path,
        *models: str,
        samples: int = 1,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        seed: int = 0,
        run_code: bool = False,
        device_map: DeviceMap | None = None,
        quantise: str | None = None,
        decoder: str | None = None,
        decoder_options: Mapping[str, Any] | None = None,
        reporter: Reporter = SILENT,
    ) -> AnswerTable:
        """Continue the prompts of a file and compare with expected answers, or run tests of programs with `run_code`.

        The temperature is 0 for one sample of each prompt and 0.8 for several, unless it is given.
        """
        settings = AnswerSettings(Path(file), Writing(samples, max_new_tokens, temperature, seed), run_code)
        return evaluate_answers(
            self._folders(models), settings, self._settings(device_map, quantise, decoder, decoder_options), reporter
        )

    def _folders(self, models: tuple[str, ...]) -> dict[str, Path]:
        layout = self._project.layout
        names = tuple(dict.fromkeys(models)) or tuple(folder.name for folder in layout.finished())
        if not names:
            raise UserError("there is no finished model to evaluate yet; make a seed with `expertctl seed`")
        return {name: layout.artefact(name) for name in names}

    def _settings(
        self,
        device_map: DeviceMap | None,
        quantise: str | None,
        decoder: str | None,
        decoder_options: Mapping[str, Any] | None,
    ) -> ModelSettings:
        if decoder_options and decoder is None:
            raise UserError("options of a decoder need a decoder")
        choice = None
        if decoder is not None:
            choice = DecoderChoice.of_workspace(decoder, decoder_options, self._project.layout)
        return ModelSettings(device_map, quantise, choice)
