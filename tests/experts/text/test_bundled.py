"""The bundled corpora: what must hold for each as installed, and for made-up installations."""

import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertctl.core.errors import UserError
from expertctl.experts.text import bundled
from expertctl.experts.text.bundled import BUNDLED, BundledSource, BundledText, drop_near_duplicates, read_bundled

NAMES = ("python", "cpp", "manual", "science")


@pytest.fixture(scope="module")
def corpora() -> dict[str, BundledText]:
    """Every bundled corpus of this installation, read once."""
    return {name: read_bundled(name) for name in NAMES}


def num_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def held_out_shares(text: BundledText) -> tuple[float, float]:
    whole = num_bytes(everything(text))
    return num_bytes(text.valid) / whole, num_bytes(text.test) / whole


def everything(text: BundledText) -> tuple[str, ...]:
    return text.train + text.valid + text.test


# --- as installed ---


def test_there_are_four_bundled_corpora() -> None:
    assert set(BUNDLED) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_has_enough_text_within_the_cap(corpora: dict[str, BundledText], name: str) -> None:
    assert 250_000 < num_bytes(everything(corpora[name])) <= 900_000
    assert all(text.strip() and len(text.encode("utf-8")) <= 40_000 for text in everything(corpora[name]))


@pytest.mark.parametrize("name", NAMES)
def test_about_a_tenth_of_the_bytes_each_is_for_validation_and_test(corpora: dict[str, BundledText], name: str) -> None:
    assert all(0.08 <= share <= 0.12 for share in held_out_shares(corpora[name]))


@pytest.mark.parametrize("max_bytes", [20_000, 100_000])
@pytest.mark.parametrize("name", NAMES)
def test_a_smaller_cap_is_met_and_split_alike(name: str, max_bytes: int) -> None:
    text = read_bundled(name, max_bytes)
    assert 0.8 * max_bytes < num_bytes(everything(text)) <= max_bytes
    assert all(0.08 <= share <= 0.12 for share in held_out_shares(text))


@pytest.mark.parametrize("name", NAMES)
def test_reading_again_gives_the_same_bytes(corpora: dict[str, BundledText], name: str) -> None:
    assert read_bundled(name) == corpora[name]


@pytest.mark.parametrize("name", NAMES)
def test_no_document_stands_in_both_parts(corpora: dict[str, BundledText], name: str) -> None:
    corpus = corpora[name]
    assert len(set(everything(corpus))) == sum(len(set(part)) for part in (corpus.train, corpus.valid, corpus.test))


@pytest.mark.parametrize("name", NAMES)
def test_no_near_duplicates_are_left_short_or_long_first(corpora: dict[str, BundledText], name: str) -> None:
    longest_first = sorted(everything(corpora[name]), key=lambda text: -len(text))
    kept = list(drop_near_duplicates(("", text) for text in longest_first))
    # cutting down to size may leave a pair that is alike up to the cut
    assert len(kept) >= 0.99 * len(longest_first)


@pytest.mark.parametrize(("first", "other"), list(combinations(NAMES, 2)))
def test_no_document_stands_in_two_corpora(corpora: dict[str, BundledText], first: str, other: str) -> None:
    assert not set(everything(corpora[first])) & set(everything(corpora[other]))


@pytest.mark.parametrize(("name", "comment"), [("cpp", r"/\*.*?\*/|(//[^\n]*\n)+"), ("python", r"(#[^\n]*\n)+")])
def test_code_starts_with_no_licence(corpora: dict[str, BundledText], name: str, comment: str) -> None:
    for text in everything(corpora[name]):
        top = re.match(rf"\s*({comment})", text, re.DOTALL)
        assert top is None or not re.search("copyright|licen[cs]e", top[0], re.IGNORECASE), top[0]


@pytest.mark.parametrize("name", NAMES)
def test_each_says_under_which_licence_it_is(name: str) -> None:
    assert re.match(r"(PSF-2\.0|BSD-3-Clause)\b", BUNDLED[name].licence)


def test_an_unknown_name_lists_the_corpora() -> None:
    with pytest.raises(UserError, match=r"no bundled corpus 'pyhton' \(did you mean 'python'\?\); known: cpp,"):
        read_bundled("pyhton")


# --- a made-up standard library ---


def program(index: int) -> str:
    return "".join(f"name_{index}_{line} = {index * line}\n" for line in range(10))


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 40 programs that stands in for the standard library."""
    root = tmp_path / "lib"
    for index in range(40):
        path = root / f"package{index % 4}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(program(index), encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_the_choice_does_not_depend_on_where_the_files_lie(stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_bundled("python")
    elsewhere = stdlib.rename(stdlib.with_name("elsewhere"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(elsewhere))
    assert read_bundled("python") == before


@pytest.mark.parametrize(
    "name",
    [
        "test/test_new.py",
        "package1/tests/new.py",
        "idlelib/new.py",
        "encodings/new.py",
        "pydoc_data/topics.py",
        "site-packages/new/new.py",
        "package1/__pycache__/new.py",
        "_sysconfigdata_linux.py",
    ],
)
def test_tests_tables_and_other_packages_are_no_part_of_the_library(stdlib: Path, name: str) -> None:
    before = read_bundled("python")
    (stdlib / name).parent.mkdir(parents=True, exist_ok=True)
    (stdlib / name).write_text(program(99), encoding="utf-8")
    assert read_bundled("python") == before


@pytest.mark.parametrize(
    "content",
    [
        b"# caf\xe9\n" + program(99).encode(),
        b"# Auto-generated by a script\n" + program(99).encode(),
        program(3).encode() + b"\n\n",
        b" \n",
    ],
    ids=["not UTF-8", "generated", "a copy", "empty"],
)
def test_files_that_are_no_new_text_are_left_out(stdlib: Path, content: bytes) -> None:
    (stdlib / "new.py").write_bytes(content)
    texts = everything(read_bundled("python"))
    assert len(texts) == 40
    assert not any("name_99_" in text for text in texts)


@pytest.mark.parametrize(
    ("head", "left"),
    [
        (
            "#!/usr/bin/env python3\n# Copyright 1999 Somebody\n# All rights reserved\n\n",
            "#!/usr/bin/env python3",
        ),
        (
            "# -*- coding: utf-8 -*-\n# Licensed to somebody.\n\n# How it works\n",
            "# -*- coding: utf-8 -*-\n\n# How it",
        ),
        ('"""What it is."""\n\n# Copyright 1999 Somebody\n', '"""What it is."""\n\n'),
        ("# How it works\n\n", "# How it works\n\n"),
    ],
)
def test_python_licence_comments_are_cut_and_other_comments_stay(stdlib: Path, head: str, left: str) -> None:
    (stdlib / "new.py").write_text(head + program(99), encoding="utf-8")
    text = next(text for text in everything(read_bundled("python")) if "name_99_" in text)
    assert text.startswith(left)
    assert text.endswith(program(99))
    assert not re.search("copyright|licen[cs]e", text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("head", "left"),
    [
        ("/*\n * Copyright 1999 Somebody\n */\n#pragma once\n", "#pragma once"),
        ("// Copyright 1999 Somebody\n// under a license\n\n// How it works\n", "// How it works"),
        ("#pragma once\n// SPDX-License-Identifier: MIT\n", "#pragma once"),
        ("/* How it works */\n", "/* How it works */"),
        (
            "#if !defined(TORCH_STABLE_ONLY) && !defined(TORCH_TARGET_VERSION)\n// Copyright 1999\nint guarded();\n",
            "int guarded();",
        ),
    ],
)
def test_cpp_licence_comments_are_cut_and_other_comments_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, left: str
) -> None:
    folder = tmp_path / "include" / "c10"
    folder.mkdir(parents=True)
    for index in range(40):
        body = "".join(f"int name_{index}_{line}();\n" for line in range(10))
        (folder / f"header{index}.h").write_text(head + body if index == 7 else body, encoding="utf-8")
    monkeypatch.setattr(bundled, "_package_folder", lambda corpus, package: tmp_path)
    text = next(text for text in everything(read_bundled("cpp")) if "name_7_" in text)
    assert text.startswith(left)
    assert not re.search("copyright|licen[cs]e|TORCH_STABLE_ONLY", text, re.IGNORECASE)


def test_docstrings_of_definitions_and_added_ones_are_found_without_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prose(name: str) -> str:
        return " ".join(f"{name}{index}" for index in range(100))

    for package in ("numpy", "scipy", "sklearn"):
        for index in range(20):
            path = tmp_path / package / f"module{index}.py"
            path.parent.mkdir(exist_ok=True)
            name = f"{package}{index}x"
            path.write_text(
                f'"""{prose(name + "module")}"""\nraise RuntimeError("imported")\n'
                f'class A:\n    def method(self):\n        """{prose(name + "method")}"""\n'
                f'def short():\n    """Too short {name}."""\n'
                f'add_newdoc("m", "n", ("attribute", """{prose(name + "added")}"""))\n',
                encoding="utf-8",
            )
    (tmp_path / "scipy" / "broken.py").write_text("def", encoding="utf-8")
    monkeypatch.setattr(bundled, "_package_folder", lambda corpus, package: tmp_path / package)
    text = read_bundled("science")
    assert len(everything(text)) == 3 * 60
    assert not any("Too short" in document for document in everything(text))

    def files(documents: Sequence[str]) -> set[str]:
        return {document.partition("x")[0] for document in documents}

    parts = [files(part) for part in (text.train, text.valid, text.test)]
    assert len(set().union(*parts)) == sum(map(len, parts))


# --- what an installation may lack ---


def test_a_missing_package_says_which_and_that_the_domain_can_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'cpp': this installation lacks the package torch; leave that domain out"):
        read_bundled("cpp")
    with pytest.raises(UserError, match="'science': this installation lacks the package numpy"):
        read_bundled("science")


def test_a_standard_library_without_source_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(UserError, match="'python': this installation lacks the standard library's source"):
        read_bundled("python")


def test_torch_without_headers_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_package_folder", lambda corpus, package: tmp_path)
    with pytest.raises(UserError, match="'cpp': this installation lacks torch's C\\+\\+ headers"):
        read_bundled("cpp")


def test_a_python_without_its_manual_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"'manual': this installation lacks Python's module pydoc_data\.topics"):
        read_bundled("manual")


def test_too_little_text_for_three_parts_says_so(stdlib: Path) -> None:
    with pytest.raises(UserError, match=r"too little text \(\d+ bytes\) for three parts"):
        read_bundled("python", max_bytes=100)


# --- any corpus ---


def made_up(sizes: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yield a unit of about each size, none like another."""
    for index, size in enumerate(sizes):
        lines = (f"unit{index}line{line}\n" for line in range(size // 12))
        yield f"unit{index}", "".join(lines)


def read_made_up(sizes: Sequence[int], max_bytes: int) -> BundledText:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUNDLED, "made up", BundledSource("", "", lambda: made_up(sizes)))
        return read_bundled("made up", max_bytes)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(400, 900), min_size=80, max_size=120), st.integers(30_000, 200_000))
def test_cap_and_split_hold_for_any_sizes(sizes: list[int], max_bytes: int) -> None:
    text = read_made_up(sizes, max_bytes)
    assert num_bytes(everything(text)) <= max_bytes
    assert all(0.08 <= share <= 0.12 for share in held_out_shares(text))
    assert len(set(everything(text))) == sum(len(set(part)) for part in (text.train, text.valid, text.test))


def test_a_huge_document_is_cut_at_the_end_of_a_line() -> None:
    text = read_made_up([3_000_000] + [20_000] * 40, 900_000)
    cut = next(document for document in everything(text) if document.startswith("unit0line"))
    assert 39_000 < len(cut) <= 40_000
    assert cut.endswith("\n")
    assert all(0.08 <= share <= 0.12 for share in held_out_shares(text))


def test_a_text_that_a_later_longer_one_contains_goes() -> None:
    whole = "".join(f"word{index}\n" for index in range(1000))
    documents = [("part", whole[:3000]), ("whole", whole), *made_up([500] * 60)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUNDLED, "made up", BundledSource("", "", lambda: documents))
        texts = everything(read_bundled("made up"))
    assert whole in texts
    assert whole[:3000] not in texts
