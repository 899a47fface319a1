"""Tables on terminals and in pipes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from expertctl.cli.output import Table, number, plain_table, print_json, print_part, shares

TABLE = Table(
    ("model", "law"),
    [("seed", "2.5 "), ("forest", "10.25*")],
    title="bits",
    right=frozenset({1}),
    strong=frozenset({(1, 1)}),
)


def test_plain_tables_are_aligned() -> None:
    assert plain_table(TABLE).splitlines() == ["bits", "model      law", "seed      2.5", "forest  10.25*"]
    assert plain_table(Table(("a",), [], headings=False)) == ""


def test_a_terminal_gets_colours_and_keeps_whole_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    name = "a-rather-long-name-of-a-model"
    print_part(Table(("model", "law"), [(name, "2.5*")], strong=frozenset({(0, 1)})))
    out = capsys.readouterr().out
    assert name in out
    assert "\x1b[1;32m2.5*" in out


def test_figures() -> None:
    assert shares({"law": 0.256, "code": 0.744}) == "law 0.26, code 0.74"
    assert number(1234567) == "1,234,567"


def test_json_has_null_where_a_number_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    broken = {
        "a": float("nan"),
        "b": [1.5, float("inf"), (float("-inf"), True)],
        "c": {"d": np.float64("nan")},
    }
    print_json(broken)
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None, [None, True]],
        "c": {"d": None},
    }


def test_control_characters_are_shown_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    print_part("a\x1b[2Jb\tc\n東\u3000京 \u202e")
    print_part(Table(("name",), [("x\x07",)]))
    assert capsys.readouterr().out == "a\\x1b[2Jb\tc\n東\u3000京 \\u202e\nname\nx\\x07\n"
