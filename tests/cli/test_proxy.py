"""`expertctl data proxy`: its output, and the configuration lines that it prints."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def with_public(fresh: Path) -> Path:
    """A workspace without a seed: the domains code and prose, and notes and functions that are public."""
    import argparse
    import inspect

    functions = [inspect.getsource(value) for value in vars(argparse).values() if inspect.isclass(value)]
    code = [piece for text in functions for piece in text.split("\n\n") if len(piece) > 80]
    prose = textwrap.wrap((argparse.__doc__ or "") * 2 + (json.__doc__ or ""), 150)
    texts = "".join(json.dumps({"text": text}) + "\n" for text in [*prose, *code])
    (fresh / "text" / "public.jsonl").write_text(texts, encoding="utf-8")
    with (fresh / "expertctl.yaml").open("a", encoding="utf-8") as config:
        config.write("  web: {path: text/public.jsonl, licence: 'PSF-2.0: as it is'}\n")
    return fresh


WORDS = ("data", "proxy", "near", "--like", "prose", "--from", "web", "--documents", "12")


def test_a_proxy_is_made_and_the_lines_that_are_printed_make_it_a_domain(run: Any, with_public: Path) -> None:
    result = run(*WORDS, cwd=with_public)
    assert result.status == 0, result.err
    first, second, *lines = result.out.splitlines()
    assert first.startswith("12 documents (")
    assert first.endswith(f"of 'web' that resemble 'prose' are in {with_public / 'proxies' / 'near.jsonl'}")
    assert second.startswith("held-out accuracy ")
    assert lines == [
        "",
        "to use it, add these lines to expertctl.yaml:",
        "domains:",
        '  "near": {path: "proxies/near.jsonl", licence: "PSF-2.0: as it is"}',
    ]
    with (with_public / "expertctl.yaml").open("a", encoding="utf-8") as config:
        config.write(lines[-1] + "\n")
    listed = run("--json", "data", "list").json["domains"]
    assert listed["near"] == {"source": "proxies/near.jsonl", "prepared": None}
    again = run(*WORDS, "--force")
    assert again.status == 0
    assert again.out.splitlines() == [first, second]  # the lines stand there already


def test_json_holds_the_statement_and_no_text(run: Any, with_public: Path) -> None:
    content = run("--json", *WORDS, "--seed", "7", cwd=with_public).json
    statement = json.loads((with_public / "proxies" / "near.json").read_text(encoding="utf-8"))
    assert content == {
        "file": str(with_public / "proxies" / "near.jsonl"),
        **statement,
        "domain": {"path": "proxies/near.jsonl", "licence": "PSF-2.0: as it is"},
    }
    assert set(statement) == {
        *("format", "name", "documents", "bytes", "digest", "held_out_accuracy", "lowest_score"),
        *("like", "from", "licence", "classifier"),
    }
    assert statement["classifier"]["seed"] == 7


def test_fewer_documents_than_asked_for_are_noted(run: Any, with_public: Path) -> None:
    path = with_public / "text" / "public.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    path.write_text("".join(lines * 3), encoding="utf-8")
    result = run(*WORDS[:-1], "60", cwd=with_public)
    assert result.status == 0
    assert "--documents: 'web' has only " in result.err
    assert run("-q", *WORDS[:-1], "60", "--force").err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("near", "--like", "prosa", "--from", "web"), "no domain 'prosa' (did you mean 'prose'?)"),
        (("near", "--like", "web", "--from", "web"), "--like and --from are both 'web'"),
        (("code", "--like", "prose", "--from", "web"), "expertctl.yaml has a domain 'code' already"),
        (("near", "--like", "code", "--from", "web"), "the classifier needs at least 20"),
        (
            ("near", "--like", "prose", "--from", "web", "--documents", "9999"),
            "cannot select 9,999 documents",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_user_errors_of_a_proxy_are_one_line(words: tuple[str, ...], said: str, run: Any, with_public: Path) -> None:
    result = run("data", "proxy", *words, cwd=with_public)
    assert result.status == 1
    assert said in result.error
    assert len(result.err.strip().splitlines()) == 1
    assert not list((with_public / "proxies").glob("*"))


def test_an_existing_corpus_is_kept(run: Any, with_public: Path) -> None:
    assert run(*WORDS, cwd=with_public).status == 0
    assert "near.jsonl exists already; use --force to replace it" in run(*WORDS).error


@pytest.mark.parametrize("words", [(*WORDS[:-1], "0"), WORDS[:5], (*WORDS, "--seed", "-1")], ids=" ".join)
def test_usage_errors_exit_2(words: tuple[str, ...], run: Any, tmp_path: Path) -> None:
    assert run(*words, cwd=tmp_path).status == 2
