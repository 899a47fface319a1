"""lm-eval's own numbers for a Hugging Face folder are those through our adapter; tasks and data are local."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from expertctl import UserError, Workspace
from expertctl.experts.measures.suites.harness import tasks as tasks_of
from expertctl.experts.measures.suites.harness.running import parse_suite

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

TASKS = {
    "tiny_choice": """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_text": """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_answer": """
task: tiny_answer
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/answer.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["zz"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
    "tiny_hub": """
task: tiny_hub
dataset_path: nobody/nothing
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "b"]
doc_to_target: answer
""",
    "tiny_all": """
group: tiny_all
task: [tiny_choice, tiny_hub]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with task files and their data; one answer is what the model writes."""
    from expertctl.core.models.generation import Sampling, generate

    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)), encoding="utf-8")
    choice = [
        {"question": f"What is {a} and {b}?", "choices": ["one", "a number of them", "é"], "answer": (a + b) % 3}
        for a in range(3)
        for b in range(3)
    ]
    text = [{"text": "The wrapped text is longer than one window of the model. " * count} for count in (1, 3, 12)]
    written = generate(model_folder, "It says", Sampling(6, temperature=0)).text
    answer = [{"question": "It says", "answer": written}, {"question": "They say", "answer": "nothing"}]
    for name, records in (("choice", choice), ("text", text), ("answer", answer)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


def test_the_numbers_are_those_of_lm_evals_own_model(shared_workspace: Path, model_folder: Path, tasks: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ("tiny_choice", "tiny_text", "tiny_answer")
    table = Workspace(shared_workspace).suites.harness(names, str(model_folder), folder=tasks)
    theirs: Any = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_folder), "dtype": "float32"},
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        device="cpu",
        log_samples=False,
    )
    compared = 0
    for task in names:
        ours = table.results[str(model_folder)]["results"][task]
        for key, value in theirs["results"][task].items():
            if isinstance(value, float) and "stderr" not in key:
                assert ours[key] == pytest.approx(value, rel=1e-5), (task, key)
                compared += 1
    assert compared == 5
    assert theirs["results"]["tiny_answer"]["exact_match,none"] == 0.5


def test_every_artefact_and_decoder_has_the_numbers_of_the_same_text(shared_workspace: Path, tasks: Path) -> None:
    """Bits per byte of an ensemble, and of a decoder with weight 0, are computed from their distributions."""
    workspace = Workspace(shared_workspace)
    seed = workspace.suites.harness(["tiny_text"], "seed", folder=tasks).values("seed")
    decoded = workspace.suites.harness(
        ["tiny_text"],
        "seed",
        folder=tasks,
        decoder="experts_against_seed",
        decoder_options={"weights": {"law": 0.0}},
    ).values("seed")
    assert [value.value for value in decoded] == pytest.approx([value.value for value in seed], rel=1e-4)
    changed = workspace.suites.harness(
        ["tiny_text"],
        "seed",
        folder=tasks,
        decoder="experts_against_seed",
        decoder_options={"weights": {"law": 2.0}},
    ).values("seed")
    assert changed[0].value != pytest.approx(seed[0].value, rel=1e-3)


def _without_own(folder: Path | None, *, with_own: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def test_unknown_tasks_and_the_network_are_refused_before_any_work(
    shared_workspace: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertctl.experts.measures.suites import opening

    monkeypatch.setattr(opening, "load_network", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(tasks_of, "_manager", _without_own)  # reading lm-eval's own takes long
    suites = Workspace(shared_workspace).suites
    for names, message in (
        (
            ["tiny_choise"],
            r"no task 'tiny_choise' \(did you mean 'tiny_choice'\?\); .*has, beside lm-eval's own: tiny_",
        ),
        (["tiny_hub"], "task 'tiny_hub' reads 'nobody/nothing' from the network, which is not used without --download"),
        (["tiny_all"], "task 'tiny_hub' reads 'nobody/nothing' from the network"),
    ):
        with pytest.raises(UserError, match=message) as error:
            suites.harness(names, "seed", folder=tasks)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="decoder 'best_of' cannot score text"):
        suites.harness(["tiny_choice"], "seed", folder=tasks, decoder="best_of")
    with pytest.raises(UserError, match="is not a folder"):
        suites.harness(["tiny_choice"], "seed", folder=tasks / "none")


def test_a_damaged_task_is_one_line(shared_workspace: Path, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere.jsonl}}\ntest_split: test\n"
    )
    with pytest.raises(UserError, match="task 'broken' cannot be opened: FileNotFoundError") as error:
        Workspace(shared_workspace).suites.harness(["broken"], "seed", folder=tmp_path)
    assert "\n" not in str(error.value)


def test_the_surroundings_are_as_before(shared_workspace: Path, tasks: Path) -> None:
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, os.environ.get("DISABLE_MULTIPROC")
    Workspace(shared_workspace).suites.harness(["tiny_answer"], "seed", folder=tasks, limit=1)
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, os.environ.get("DISABLE_MULTIPROC"))


@pytest.mark.parametrize("text", ["lm-eval", "lm-eval:", "helm:mmlu", "lm-eval: , "])
def test_other_suites_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="no suite"):
        parse_suite(text)


def test_tasks_are_separated_by_commas() -> None:
    assert parse_suite("lm-eval:a, b,a") == ("a", "b")
