"""Errors name what was meant and what there is."""

from __future__ import annotations

import pytest

from expertctl.core.errors import Interrupted, UserError, closest, unknown_name


def test_a_near_miss_is_guessed_and_every_choice_is_listed() -> None:
    error = unknown_name("merge method", "tise", ["ties", "dare", "linear"], listed_as="installed")
    assert str(error) == "no merge method 'tise' (did you mean 'ties'?); installed: dare, linear, ties"


def test_a_far_miss_is_not_guessed() -> None:
    assert str(unknown_name("expert", "xyz", ["law"])) == "no expert 'xyz'; known: law"
    assert str(unknown_name("expert", "law", [])) == "no expert 'law'; known: none"
    assert closest("xyz", []) is None


def test_exit_statuses_are_one_for_mistakes_and_130_for_interruptions() -> None:
    assert UserError("x").exit_status == 1
    assert Interrupted("x").exit_status == 130
    with pytest.raises(UserError):
        raise Interrupted("x")
