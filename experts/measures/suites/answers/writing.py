"""Continuations of prompts, several samples of each, in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .....core.process.compute import threads_for_tokens
from .....core.reporting import SILENT, Reporter
from ..opening import OpenedModel
from .prompts import Prompt

if TYPE_CHECKING:
    from .....core.models.generation import Sampling

ROWS = 16
"""Continuations that are written at a time."""


@dataclass(frozen=True)
class Writing:
    """How continuations are sampled."""

    samples: int = 1
    """For each prompt."""
    max_new_tokens: int = 256
    temperature: float | None = None
    """None: 0 for one sample, 0.8 for several."""
    seed: int = 0

    @property
    def sampling(self) -> Sampling:
        """The settings of generation, without stop texts."""
        from .....core.models.generation import Sampling

        default = 0.0 if self.samples == 1 else 0.8
        temperature = default if self.temperature is None else self.temperature
        return Sampling(self.max_new_tokens, temperature, seed=self.seed)


def write(
    opened: OpenedModel,
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]],
    settings: Writing,
    reporter: Reporter = SILENT,
) -> list[list[str]]:
    """Return the samples of each prompt, whose tokens are given; raises `UserError` for one that is too long.

    Prompts with the same stop texts share batches, which do not depend on the device.
    """
    import torch

    from .....core.models.generation import continue_prompts, weight_bytes

    for prompt, ids in zip(prompts, tokens, strict=True):
        opened.require_positions(len(ids) + settings.max_new_tokens, prompt.where, "--max-new-tokens")
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.stop, []).extend([number] * settings.samples)
    written: Mapping[int, list[str]] = {number: [] for number in range(len(prompts))}
    total, done = len(prompts) * settings.samples, 0
    with torch.inference_mode(), threads_for_tokens(weight_bytes(opened.model)):
        for stop, rows in groups.items():
            sampling = replace(settings.sampling, stop=stop)
            for begin in range(0, len(rows), ROWS):
                batch = rows[begin : begin + ROWS]
                opened.forget()
                torch.manual_seed(settings.seed + done)
                for number, ids in zip(
                    batch,
                    continue_prompts(opened.decoder, opened.tokenizer, [tokens[row] for row in batch], sampling),
                    strict=True,
                ):
                    text = opened.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                    written[number].append(str(text))
                done += len(batch)
                reporter.progress(f"writing with {opened.name}", done, total, "answers")
    return [written[number] for number in range(len(prompts))]
