"""The validation text of a merge, which is prepared only if something is fitted on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...core.hooks.text import ValidationText

Validation = Callable[[], Sequence[ValidationText]]
"""Prepares and returns validation text."""


class UsedText:
    """Validation text that is prepared when it is first called for, and remembered."""

    def __init__(self, prepare: Validation) -> None:
        self._prepare = prepare
        self._texts: Sequence[ValidationText] = ()

    def __call__(self) -> Sequence[ValidationText]:
        self._texts = self._texts or tuple(self._prepare())
        return self._texts

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of the text; empty if it was never called for."""
        return tuple(text.domain for text in self._texts)
