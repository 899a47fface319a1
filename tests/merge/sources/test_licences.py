"""Licence conflicts and the licence of the merged model."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertctl.core.artefacts.licence_card import licence_on_card
from expertctl.core.errors import UserError
from expertctl.merge.sources.licences import check_licences, require_compatible


@pytest.mark.parametrize(
    ("licences", "result"),
    [
        (("apache-2.0", "mit"), "apache-2.0; mit"),
        (("Apache-2.0", "apache-2.0"), "Apache-2.0"),
        (("apache-2.0", "llama3"), "llama3"),
        (("mit", "cc-by-sa-4.0"), "cc-by-sa-4.0"),
        (("gpl-3.0", "agpl-3.0", "mit"), "agpl-3.0"),
        (("cc-by-nc-4.0", "apache-2.0"), "cc-by-nc-4.0"),
        (("apache-2.0", None), None),
        (("cc-by-nc-4.0", None), None),
        ((None, None), None),
    ],
)
def test_licences_that_go_together(licences: tuple[str | None, ...], result: str | None) -> None:
    report = check_licences({f"m{number}": licence for number, licence in enumerate(licences)})
    assert report.conflicts == ()
    assert report.result == result


@pytest.mark.parametrize(
    "licences",
    [
        ("cc-by-nd-4.0", "cc-by-nd-4.0"),
        ("llama3", "gemma"),
        ("gpl-3.0", "cc-by-nc-4.0"),
        ("cc-by-sa-4.0", "llama2"),
        ("apache-2.0", "gpl-2.0"),
        ("CC-BY-NC-SA-4.0", "cc-by-sa-4.0"),
    ],
)
def test_licences_that_contradict_name_both_models(licences: tuple[str, str]) -> None:
    report = check_licences(dict(zip(("law", "code"), licences, strict=True)))
    assert "'law'" in report.conflicts[0]
    assert licences[0].lower() in report.conflicts[0]
    with pytest.raises(UserError, match="use --allow-licences"):
        require_compatible(report, False)
    require_compatible(report, True)


def test_unknown_licences_are_a_note_and_no_conflict() -> None:
    report = check_licences({"law": "my-own-2", "code": "mit", "seed": None})
    assert report.conflicts == ()
    assert any("'my-own-2'" in note for note in report.notes)
    assert any("seed" in note for note in report.notes)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Model\n", "mit"),
        ("# no head\nlicense: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: : :\n---\n", None),
        (None, None),
    ],
)
def test_a_folders_licence_is_its_cards(tmp_path: Path, card: str | None, licence: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_on_card(tmp_path) == licence
