"""Files of several merges: names, order, and what is refused by file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toy_models import random_tensors, write_model

from expertctl.core.errors import UserError
from expertctl.merge.recipes.mergekit_documents import Stage, read_stages
from expertctl.merge.recipes.mergekit_file import read_mergekit

FIRST = "name: first\nmerge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
SECOND = "name: second\nmerge_method: slerp\nbase_model: first\nmodels: [{model: c}]\nparameters: {t: 0.5}\n"
LAST = "merge_method: linear\nmodels: [{model: second, parameters: {weight: 1}}, {model: first, parameters: {weight: 2}}]\n"

Read = Callable[..., tuple[Stage, ...]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    for seed, name in enumerate("abc"):
        write_model(tmp_path / name, random_tensors(seed))

    def call(*documents: str) -> tuple[Stage, ...]:
        path = tmp_path / "multi.yml"
        path.write_text("---\n".join(documents))
        return read_stages(path, tmp_path / "out")

    return call


def test_results_are_inputs_by_name_and_come_first(read: Read, tmp_path: Path) -> None:
    stages = read(LAST, SECOND, FIRST)
    assert [stage.name for stage in stages] == ["first", "second", "final"]
    assert [stage.needs for stage in stages] == [(), ("first",), ("first", "second")]
    assert [stage.folder for stage in stages] == [tmp_path / "out" / stage.name for stage in stages]
    assert stages[1].recipe.models == {"first": tmp_path / "out" / "first", "c": tmp_path / "c"}
    assert stages[2].recipe.references == {}


def test_a_result_has_precedence_over_a_folder_of_its_name(read: Read, tmp_path: Path) -> None:
    write_model(tmp_path / "first", random_tensors(9))
    stages = read(FIRST, SECOND)
    assert stages[1].recipe.models["first"] == tmp_path / "out" / "first"


def test_merges_without_dependencies_keep_their_order(read: Read) -> None:
    stages = read(FIRST.replace("first", "z"), FIRST.replace("first", "a-z"), FIRST.replace("name: first\n", ""))
    assert [stage.name for stage in stages] == ["z", "a-z", "final"]


def test_one_document_is_merged_into_the_output_itself(read: Read, tmp_path: Path) -> None:
    for documents in ((FIRST,), ("", FIRST, "")):
        (stage,) = read(*documents)
        assert (stage.folder, stage.needs) == (tmp_path / "out", ())


def test_mixtures_may_be_stages(read: Read) -> None:
    mixture = "name: moe\nbase_model: first\ngate_mode: random\nexperts: [{source_model: a}, {source_model: b}]\n"
    stages = read(mixture, FIRST)
    assert [stage.recipe.method for stage in stages] == ["linear", "mixture"]
    assert stages[1].needs == ("first",)


@pytest.mark.parametrize(
    ("documents", "part"),
    [
        ((FIRST, FIRST), r"multi.yml:5: two merges are called 'first'; rename one"),
        ((LAST, LAST), r"multi.yml:4: two merges are called 'final', which is also the name of a document without"),
        ((FIRST.replace("first", "../x"), LAST), r"multi.yml:1: a merge cannot be called '../x'"),
        ((FIRST.replace("first", "3"), LAST), r"multi.yml:1: 'name' must be a text \(it is 3\)"),
        ((FIRST, "- a\n"), r"multi.yml:5: a document is a mapping of keys to values"),
        (
            (FIRST, SECOND.replace("first", "third"), SECOND.replace("second", "third").replace("first", "second")),
            r"multi.yml:5: the merges 'second', 'third' wait for the results of each other",
        ),
        ((FIRST, SECOND.replace("base_model: first", "base_model: second")), r"multi.yml:5: the merges 'second' wait"),
        ((FIRST, SECOND.replace("base_model: first", "base_model: frist")), r"multi.yml:7: there is no folder frist"),
        ((FIRST, SECOND.replace("slerp", "slrep")), r"multi.yml:6: no merge method 'slrep'"),
        ((FIRST, SECOND.replace("models", "modles")), r"multi.yml:8: unknown key 'modles'"),
    ],
)
def test_mistakes_are_refused_by_file_and_line(read: Read, documents: tuple[str, ...], part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        read(*documents)
    assert "\n" not in str(caught.value)


def test_reading_one_recipe_refuses_several(read: Read, tmp_path: Path) -> None:
    read(FIRST, LAST.replace("second", "a"))
    with pytest.raises(UserError, match=r"multi.yml:5: not valid YAML: a second document"):
        read_mergekit(tmp_path / "multi.yml")
