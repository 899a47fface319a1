"""Questions that need two skills, beside those that need one of them: the law of the weakest link (arXiv:2409.19951).

A pair of skills is at its weaker one if its score is nearer to it than to the stronger one, or below both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from .intervals import Bootstrap, Interval, interval_of, share_interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Verdict = Literal["yes", "no", "unclear"]
Skills = tuple[str, ...]


@dataclass(frozen=True)
class Skill:
    """The score on questions that need one skill alone."""

    name: str
    questions: int
    score: Interval


@dataclass(frozen=True)
class SkillPair:
    """The score on questions that need two skills together."""

    names: tuple[str, str]
    questions: int
    score: Interval
    weaker: str | None
    """The skill with the lower score, the first of equals; None if one of them has no questions of its own."""
    above_weaker: Interval | None
    """The pair's score minus that of the weaker skill."""
    at_weaker: Verdict | None
    """Whether the pair is at its weaker skill: `unclear` if the interval of its distance from the middle has both signs."""
    place: float | None
    """Where the pair is between the weaker skill (0) and the stronger one (1); None if they score the same."""


@dataclass(frozen=True)
class SkillTable:
    """Skills and pairs of one model."""

    skills: Sequence[Skill]
    pairs: Sequence[SkillPair]
    untagged: int
    """Number of questions without skills."""

    def as_json(self) -> dict[str, Any]:
        """Return skills and pairs by name."""
        skills = {skill.name: {"questions": skill.questions, **skill.score.as_json()} for skill in self.skills}
        pairs = [
            {
                "skills": list(pair.names),
                "questions": pair.questions,
                **pair.score.as_json(),
                "weaker": pair.weaker,
                "above_weaker": None if pair.above_weaker is None else pair.above_weaker.as_json(),
                "at_weaker": pair.at_weaker,
                "place": pair.place,
            }
            for pair in self.pairs
        ]
        return {"skills": skills, "pairs": pairs, "untagged": self.untagged}


def skill_table(tags: Sequence[Skills], scores: Sequence[float]) -> SkillTable | None:
    """Return the table of questions with these tags and these scores from 0 to 1; None without tags.

    Each group of questions is resampled on its own, since a resample of all could be without one of them.
    """
    groups: dict[Skills, list[float]] = {}
    for own, score in zip(tags, scores, strict=True):
        groups.setdefault(own, []).append(score)
    if set(groups) <= {()}:
        return None
    names = sorted({name for own in groups for name in own})
    resampled = {
        own: Bootstrap(len(values), seed=number).means(values)
        for number, (own, values) in enumerate(sorted(groups.items()))
    }
    skills = [Skill(name, len(groups[(name,)]), share_interval(groups[(name,)])) for name in names if (name,) in groups]
    pairs = [_pair(pair, groups, resampled) for pair in combinations(names, 2) if pair in groups]
    return SkillTable(skills, pairs, len(groups.get((), ())))


def _pair(
    names: tuple[str, str], groups: Mapping[Skills, Sequence[float]], resampled: Mapping[Skills, NDArray[np.float64]]
) -> SkillPair:
    import numpy as np

    values = groups[names]
    score = share_interval(values)
    alone = [(name,) for name in names]
    if not all(own in groups for own in alone):
        return SkillPair(names, len(values), score, None, None, None, None)
    means = [sum(groups[own]) / len(groups[own]) for own in alone]
    low, high = min(means), max(means)
    stacked = np.stack([resampled[own] for own in alone])
    above = interval_of(score.value - low, resampled[names] - stacked.min(axis=0))
    from_middle = interval_of(score.value - (low + high) / 2, resampled[names] - stacked.mean(axis=0))
    verdict: Verdict = "unclear"
    if from_middle.excludes_zero:
        verdict = "yes" if from_middle.high < 0 else "no"
    place = None if high == low else (score.value - low) / (high - low)
    return SkillPair(names, len(values), score, names[means.index(low)], above, verdict, place)
