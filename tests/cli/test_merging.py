"""Merge commands: plans, resuming, cards, reproduction, statistics, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.verification import verify


def test_a_plan_is_a_table_and_with_verbose_a_row_for_each_tensor(workspace: Path, run: Any) -> None:
    plain = run("merge", "m", "--method", "ties", "--plan")
    assert plain.status == 0
    for word in ("method", "ties", "reads", "writes", "memory", "time", "licence"):
        assert word in plain.out
    assert "model.norm.weight" not in plain.out
    verbose = run("--verbose", "merge", "m", "--method", "ties", "--plan")
    assert "model.norm.weight" in verbose.out
    assert not (workspace / "generalists" / "m").exists()


def test_options_per_layer_and_module_reach_the_tensors(workspace: Path, run: Any) -> None:
    option = "density=[{filter: mlp, value: [0.1, 0.9]}, {value: 0.5}]"
    plan = run("--json", "merge", "m", "--method", "ties", "--option", option, "--plan").json
    densities = {
        name: tensor["options"]["density"] for name, tensor in plan["tensors"].items() if tensor["action"] == "merge"
    }
    layers = plan["layers"]
    assert densities["model.layers.0.mlp.up_proj.weight"] == 0.1
    assert densities[f"model.layers.{layers - 1}.mlp.up_proj.weight"] == 0.9
    assert densities["model.norm.weight"] == 0.5


def test_settings_of_the_project_file_are_taken(workspace: Path, run: Any) -> None:
    project = yaml.safe_load((workspace / "expertctl.yaml").read_text())
    project["merges"] = {
        "m": {
            "method": "ties",
            "weights": {"code": [0.5, 1.0], "prose": 1},
            "options": {"density": {"code": 0.3, "prose": 0.6}},
            "dtype": "bfloat16",
        }
    }
    (workspace / "expertctl.yaml").write_text(yaml.safe_dump(project))
    assert run("merge", "m").status == 0
    manifest = read_manifest(workspace / "generalists" / "m")
    assert manifest.merged.options["density"] == [0.3, 0.6]
    assert (
        json.loads((workspace / "generalists" / "m" / "config.json").read_text()).get("dtype", "bfloat16") == "bfloat16"
    )
    assert run("reproduce", "m").out.strip() == "m: byte-identical"


def test_a_result_that_was_changed_is_not_reproduced(workspace: Path, run: Any) -> None:
    run("merge", "m", "--method", "average")
    path = workspace / "generalists" / "m" / "generalist.json"
    content = json.loads(path.read_text())
    content["tensors"]["model.norm.weight"] = "0" * 64
    path.write_text(json.dumps(content))
    result = run("--json", "reproduce", "m")
    assert result.status == 1
    assert result.json["differences"] == ["tensor model.norm.weight differs"]


def test_an_unfinished_merge_is_shown_with_the_command_that_goes_on(workspace: Path, run: Any) -> None:
    (workspace / "generalists" / ".m.unfinished").mkdir(parents=True)
    assert run("--json", "show").json["unfinished"] == {"m": "expertctl merge m --resume"}
    assert run("merge", "m", "--method", "average", "--resume").status == 0
    assert run("--json", "show").json["unfinished"] == {}


def test_a_card_with_an_evaluation(workspace: Path, run: Any) -> None:
    scores = {"domains": ["code"], "models": {"forest": {"bits_per_byte": {"code": 2.5}}}}
    Path("scores.json").write_text(json.dumps(scores))
    assert "| forest | 2.500 |" in run("card", "forest", "--evaluation", "scores.json").out
    assert run("card", "code", "-o", "card.md").status == 0
    assert Path("card.md").read_text().startswith("---\n")
    Path("scores.json").write_text("{}")
    assert "is not the output of `expertctl eval --json`" in run("card", "forest", "--evaluation", "scores.json").error


def test_statistics_and_the_merge_by_them(workspace: Path, run: Any) -> None:
    told = run("merge", "m", "--method", "regmean").error
    assert told == "expert 'code' has no gram statistics; collect them with `expertctl stats code --kind gram`"
    statistics = run("--json", "stats", "code", "prose", "--samples", "2").json["statistics"]
    assert statistics["prose"]["domain"]["name"] == "prose"
    assert run("merge", "m", "--method", "regmean").status == 0


def test_an_adapter_is_extracted_and_merged(workspace: Path, run: Any) -> None:
    result = run("--json", "extract-adapter", "code", "--base", "seed", "-o", "lora", "--energy", "0.9", "--save-rest")
    assert result.status == 0, result.err
    assert 0 < result.json["error"] < 0.33
    assert run("merge", "m", "--method", "linear", "--experts", "prose,lora").status == 0
    assert verify(workspace / "generalists" / "m") == []
    kinds = {parent.name: parent.kind for parent in read_manifest(workspace / "generalists" / "m").parents}
    assert kinds == {"seed": "seed", "prose": "expert", "lora": "adapter"}


def test_a_config_file_says_it_all(workspace: Path, run: Any) -> None:
    Path("m.yml").write_text("merge_method: linear\nmodels: []\n")
    assert run("merge", "m", "--config", "m.yml", "-o", "out").status == 2
    assert run("merge", "--config", "m.yml", "-o", "out", "--method", "ties").status == 2
    assert "omit --experts" in run("merge", "--config", "m.yml", "-o", "out", "--experts", "a,b").err
    assert "omit --option" in run("merge", "--config", "m.yml", "-o", "out", "--option", "t=1").err
    assert run("merge", "--config", "m.yml").status in (1, 2)
    assert run("merge").status == 2


def test_several_documents_of_a_file_are_merged_one_after_the_other(workspace: Path, run: Any) -> None:
    merge = "merge_method: task_arithmetic\nbase_model: seed\nparameters: {weight: 0.5}\n"
    documents = [
        f"{merge}models: [{{model: both}}, {{model: experts/code}}]\n",
        f"name: both\n{merge}models: [{{model: experts/code}}, {{model: experts/prose}}]\n",
    ]
    Path("m.yml").write_text("---\n".join(documents))
    plan = run("merge", "--config", "m.yml", "--plan")
    assert plan.status == 0, plan.err
    assert "final: planned after both" in plan.out
    merges = run("--json", "merge", "--config", "m.yml", "-o", "out", "--plan").json["merges"]
    assert (merges["final"], merges["both"]["output"]) == ({"needs": ["both"]}, "out/both")
    assert not Path("out").exists()
    result = run("--json", "merge", "--config", "m.yml", "-o", "out")
    assert result.status == 0, result.err
    assert [entry["name"] for entry in result.json["merges"]] == ["both", "final"]
    assert all(verify(Path("out") / name) == [] for name in ("both", "final"))
    again = run("merge", "--config", "m.yml", "-o", "out", "--resume")
    assert "is in out/final: task_arithmetic of " in again.out
    assert run("reproduce", "out/final").out.strip() == "final: byte-identical"


def test_a_search_by_layer_groups_prints_a_weight_for_each(workspace: Path, run: Any) -> None:
    words = ["--json", "merge", "m", "--method", "average", "--search", "--trials", "2", "--layer-groups", "2"]
    search = run(*words).json["search"]
    assert search["trials"] == 2
    assert all(len(weights) == 2 for weights in search["weights"].values())


def test_a_search_on_the_command_line(workspace: Path, run: Any) -> None:
    result = run("merge", "m", "--method", "average", "--search", "--trials", "3")
    assert result.status == 0, result.err
    assert "trial 3 of 3" in result.err
    assert read_manifest(workspace / "generalists" / "m").merged.search.trials == 3
