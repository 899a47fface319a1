"""Whole merges: checks before any work, and the written files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reporters import Recorder
from safetensors.torch import load_file, save_file

import expertctl
from expertctl.core.artefacts.digests import digests_of_folder
from expertctl.core.artefacts.files import exclusive
from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.settings import MergeConfig
from expertctl.core.errors import UserError
from expertctl.core.hooks.manager import PluginManager
from expertctl.core.hooks.merging import MergeMethod, ModelBuilder, TensorMerge
from expertctl.core.hooks.text import ValidationText
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.statements import DataStatement
from expertctl.core.manifests.verification import verify
from expertctl.core.models.kernels.posterior import EWMA_RATE
from expertctl.core.reporting import SILENT
from expertctl.core.testing import fresh_plugins
from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
from expertctl.merge.merging import MergeRun, merge
from expertctl.merge.planning.weights import resolve_weights

EXPERTS = ("code", "law", "news")


def files_of(workspace: Path) -> dict[str, bytes]:
    return {
        path.relative_to(workspace).as_posix(): path.read_bytes()
        for path in workspace.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    }


def average(workspace: Path, name: str = "m", **settings: Any) -> Any:
    return expertctl.Workspace(workspace).merge(name, method="average", **settings)


# --- weights ---


def weights(wanted: Any, experts: tuple[str, ...] = EXPERTS) -> dict[str, float]:
    return resolve_weights(wanted, Path("seed"), dict.fromkeys(experts, Path()), tuple, SILENT)


def test_uniform_weights_are_equal_and_sum_to_one() -> None:
    assert weights("uniform") == dict.fromkeys(EXPERTS, 1 / 3)


def test_given_weights_are_scaled_to_one_and_follow_the_experts_order() -> None:
    given = weights({"news": 1, "law": 0, "code": 3})
    assert list(given.items()) == [("code", 0.75), ("law", 0), ("news", 0.25)]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"lwa": 1}, r"no expert 'lwa' \(did you mean 'law'\?\); this merge takes: code, law, news"),
        ({"law": -1, "code": 1, "news": 1}, "the weight of 'law' is -1; weights must be 0 or more"),
        ({"law": 1}, "no weight is given for code, news; give a weight for every expert of the merge"),
        ({"law": 0, "code": 0, "news": 0}, "the weights sum to 0; give at least one positive weight"),
    ],
)
def test_weights_that_make_no_sense_are_refused(wanted: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        weights(wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(workspace: Path, bad: float) -> None:
    with pytest.raises(UserError, match=r"weights\.law: input should be a finite number"):
        average(workspace, weights={"law": bad, "code": 1, "news": 1})


# --- what is refused before any work ---


def expect_refusal(workspace: Path, said: str, method: str = "average", **settings: Any) -> None:
    before = files_of(workspace)
    with pytest.raises(UserError, match=said) as caught:
        expertctl.Workspace(workspace).merge("m", method=method, **settings)
    assert "\n" not in str(caught.value)
    assert files_of(workspace) == before
    assert not list(workspace.glob("generalists/*"))


def test_an_unknown_method_is_refused(workspace: Path) -> None:
    expect_refusal(
        workspace,
        r"no merge method 'avrage' \(did you mean 'average'\?\); installed: .*average, .*ensemble",
        "avrage",
    )


def test_an_unknown_or_bad_option_is_refused(workspace: Path) -> None:
    expect_refusal(workspace, "merge method 'average' has no option 'trim'", options={"trim": 1})
    expect_refusal(
        workspace, r"has no option 'topk' \(did you mean 'top_k'\?\)", method="ensemble", options={"topk": 1}
    )
    expect_refusal(workspace, "option posterior: Input should be", method="ensemble", options={"posterior": "x"})


def test_a_bad_name_is_refused(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"a generalist cannot be called '\.\./m'"):
        average(workspace, "../m")


def test_an_unknown_expert_is_refused(workspace: Path) -> None:
    expect_refusal(
        workspace,
        r"no expert 'lwa' \(did you mean 'law'\?\); finished: code, law, news",
        experts=["lwa", "code"],
    )


def test_an_unfinished_expert_is_refused(workspace: Path) -> None:
    (workspace / "experts" / "begun").mkdir()
    expect_refusal(
        workspace,
        "expert 'begun' is not finished; resume it with `expertctl train begun`",
        experts=["begun", "law"],
    )


def test_a_repeated_expert_is_refused(workspace: Path) -> None:
    expect_refusal(workspace, "expert 'law' is named twice", experts=["law", "code", "law"])


def test_no_expert_at_all_is_refused(tmp_path: Path, new_workspace: Any) -> None:
    empty = new_workspace(tmp_path / "empty", ())
    expect_refusal(empty, "there are no finished experts to merge; train one")
    expect_refusal(empty, "there are no finished experts to merge; train one", experts=[])


def rewritten(workspace: Path, name: str, **changes: Any) -> None:
    """Change an expert's manifest, which then is as it would have been written."""
    folder = workspace / "experts" / name
    replace(read_manifest(folder), **changes).write(folder)


def test_an_expert_of_another_seed_is_refused(workspace: Path) -> None:
    parent = replace(read_manifest(workspace / "experts" / "law").parents[0], digest="e" * 64)
    rewritten(workspace, "law", parents=(parent,))
    seed = read_manifest(workspace / "seed").digest[:12]
    expect_refusal(workspace, f"expert 'law' was branched from seed {'e' * 12}, but this workspace's seed is {seed}")


def test_an_expert_without_a_seed_is_refused(workspace: Path) -> None:
    rewritten(workspace, "law", parents=())
    expect_refusal(workspace, "expert 'law' was branched from seed none")


def test_an_expert_of_another_tokenizer_is_refused(workspace: Path) -> None:
    rewritten(workspace, "law", tokenizer="f" * 64)
    expect_refusal(
        workspace,
        f"expert 'law' was trained with tokenizer {'f' * 12}, but the seed has .*belong to different tokens",
    )


def test_a_real_workspace_of_another_seed_cannot_lend_experts(
    workspace: Path, tmp_path: Path, new_workspace: Any
) -> None:
    other = new_workspace(tmp_path / "other", ("med",), seed=9)
    (other / "experts" / "med").rename(workspace / "experts" / "med")
    expect_refusal(workspace, "expert 'med' was branched from seed")


@pytest.mark.parametrize(("place", "method"), [("experts/law", "average"), ("seed", "ties")])
def test_a_flipped_bit_in_weights_that_are_read_is_refused(workspace: Path, place: str, method: str) -> None:
    path = workspace / place / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.unlink()
    path.write_bytes(content)
    expect_refusal(
        workspace,
        rf"tensor '.*' in .*{place}/model.safetensors was changed: its digest differs from the manifest; restore or recreate",
        method=method,
    )


def test_truncated_weights_are_refused(workspace: Path) -> None:
    path = workspace / "experts" / "law" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    expect_refusal(workspace, r"experts/law is not what its manifest says: file .*|model\.safetensors is damaged")


def test_a_workspace_without_a_seed_is_refused(workspace: Path) -> None:
    (workspace / "seed" / "seed.json").unlink()
    expect_refusal(workspace, "has no finished seed")


def test_a_merge_that_another_process_is_making_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(workspace)
    monkeypatch.setattr(exclusive.__wrapped__, "__kwdefaults__", {"patience_s": 0.1})
    with (
        exclusive(layout.lock("generalist-m"), "x"),
        pytest.raises(UserError, match="another process is working on generalist 'm'"),
    ):
        average(workspace)
    assert not (workspace / "generalists").exists()


# --- what is written ---


def test_a_merge_is_a_model_folder_that_can_be_verified(workspace: Path) -> None:
    manifest = average(workspace, weights={"code": 2, "law": 1, "news": 1})
    folder = workspace / "generalists" / "m"
    assert verify(folder) == []
    assert read_manifest(folder) == manifest
    assert [(parent.kind, parent.name, parent.weight) for parent in manifest.parents] == [
        ("seed", "seed", None),
        ("expert", "code", 0.5),
        ("expert", "law", 0.25),
        ("expert", "news", 0.25),
    ]
    assert manifest.parents[1].digest == read_manifest(workspace / "experts" / "code").digest
    assert manifest.tokenizer == read_manifest(workspace / "seed").tokenizer
    assert manifest.merged.method == "average"
    assert set(manifest.expert_data) == set(EXPERTS)
    assert manifest.licence == "CC0-1.0"
    model, tokenizer = expertctl.load_model(folder)
    assert model(torch.tensor([tokenizer("law")["input_ids"]])).logits.shape[-1] == len(tokenizer)


def test_a_merge_equals_the_plain_mean_of_the_files(workspace: Path) -> None:
    average(workspace)
    tensors = load_file(workspace / "generalists" / "m" / "model.safetensors")
    members = [load_file(workspace / "experts" / name / "model.safetensors") for name in EXPERTS]
    for name, tensor in tensors.items():
        expected = sum(member[name].double() for member in members) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_same_merge_again_gives_the_same_bytes(workspace: Path) -> None:
    first = average(workspace, "a")
    second = average(workspace, "b")
    assert second.tensors == first.tensors
    assert second.config == first.config
    average(workspace, "a", force=True)
    files = files_of(workspace / "generalists")
    named = {"generalist.json", "README.md"}  # these hold the name
    assert {f"b/{path[2:]}" for path in files if path.startswith("a/")} == {
        path for path in files if path.startswith("b/")
    }
    for path, content in files.items():
        if path.startswith("a/") and path[2:] not in named:
            assert files[f"b/{path[2:]}"] == content


def test_a_finished_generalist_is_not_replaced_without_force(workspace: Path) -> None:
    average(workspace, experts=["law"])
    before = files_of(workspace / "generalists")
    with pytest.raises(UserError, match=r"generalist .*m exists already; use --force"):
        average(workspace, experts=["code"])
    assert files_of(workspace / "generalists") == before
    average(workspace, experts=["code"], force=True)
    assert [parent.name for parent in read_manifest(workspace / "generalists" / "m").parents] == [
        "seed",
        "code",
    ]


def test_a_forced_merge_that_is_refused_leaves_the_old_one(workspace: Path) -> None:
    average(workspace)
    before = files_of(workspace / "generalists")
    with pytest.raises(UserError, match="no expert"):
        average(workspace, experts=["nobody"], force=True)
    assert files_of(workspace / "generalists") == before


def test_a_merge_may_go_elsewhere(workspace: Path, tmp_path: Path) -> None:
    average(workspace, output=tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere") == []
    assert not (workspace / "generalists").exists()


def test_merges_of_the_project_file_are_made(tmp_path: Path, new_workspace: Any) -> None:
    config = "merges: {m: {method: average, experts: [law, code], weights: {law: 3, code: 1}}}\n"
    workspace = new_workspace(tmp_path / "ws", EXPERTS, config=config)
    manifest = expertctl.Workspace(workspace).merge("m")
    assert {parent.name: parent.weight for parent in manifest.parents[1:]} == {"law": 0.75, "code": 0.25}
    with pytest.raises(UserError, match=r"merge 'n' is not in expertctl\.yaml; give its method: --method METHOD"):
        expertctl.Workspace(workspace).merge("n")


def test_experts_that_are_merged_need_no_data_statement(workspace: Path) -> None:
    """What a plugin or an owner sends may say less than our own training does."""
    rewritten(workspace, "law", data=DataStatement())
    average(workspace)


# --- merges by plugins ---


@dataclass(frozen=True, slots=True)
class SlotOptions:
    scale: float = 1.0


def with_plugins(monkeypatch: pytest.MonkeyPatch, *methods: MergeMethod, told: list[Any] | None = None) -> None:
    class Plugin:
        @expertctl.hookimpl
        def merge_methods(self) -> list[MergeMethod]:
            return list(methods)

        @expertctl.hookimpl
        def merge_finished(self, event: Any) -> None:
            if told is not None:
                told.append(event)

    manager: PluginManager = fresh_plugins(Plugin())
    for module in ("merge.merging", "merge.planning.plan", "merge.generalists.folder", "workspace.generalists"):
        monkeypatch.setattr(f"expertctl.{module}.installed_plugins", lambda: manager)


def test_plugins_are_told_and_named_in_the_manifest(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    method = TensorMerge("seed_again", "", merge=lambda group, options: group.seed, options=SlotOptions)
    with_plugins(monkeypatch, method, told=told)
    manifest = expertctl.Workspace(workspace).merge("m", method="seed_again", options={"scale": "2"})
    assert manifest.merged.options == {"scale": 2.0}
    assert manifest.versions["local"] == "?"
    assert [(event.name, event.folder, event.method) for event in told] == [
        ("m", workspace / "generalists" / "m", "seed_again")
    ]


def test_a_method_that_fails_half_way_leaves_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(inputs: Any, options: Any, folder: Path) -> None:
        (folder / "config.json.new").write_text("x")
        raise UserError("cannot")

    with_plugins(monkeypatch, ModelBuilder("fails", "", build=fail))
    with pytest.raises(UserError, match="cannot"):
        expertctl.Workspace(workspace).merge("m", method="fails")
    assert list((workspace / "generalists").iterdir()) == []


# --- weights and priors fitted on text ---


def some_text(folder: Path, domain: str, tokens: int, seed: int, block_size: int = 8) -> ValidationText:
    (folder / domain).mkdir(parents=True)
    ids = np.random.default_rng(seed).integers(1, 300, tokens).tolist()
    write_part(folder / domain, [EncodedDocument("x" * tokens, ids)], separator=0, vocabulary=300)
    return ValidationText(domain, TokenBlocks(TokenStore(folder / domain), block_size))


def naive_prior(workspace: Path, text: ValidationText, samples: int, kind: str) -> list[float]:
    """The exponentially weighted mean of the posterior at the last position of blocks of one text, in plain floats."""
    members = [expertctl.load_model(workspace / "experts" / name)[0].double() for name in EXPERTS]
    count = min(samples, len(text.blocks))
    prior = [1 / len(EXPERTS)] * len(EXPERTS)
    for number in range(count):
        tokens = text.blocks.block(number * len(text.blocks) // count).tolist()
        with torch.no_grad():
            logs = [m(torch.tensor([tokens])).logits[0].log_softmax(-1) for m in members]
        heard = range(1, len(tokens) - 1) if kind == "prefix" else [len(tokens) - 2]
        totals = [sum(float(log[t - 1, tokens[t]]) for t in heard) for log in logs]
        joint = [share * math.exp(total) for share, total in zip(prior, totals, strict=True)]
        last = [value / sum(joint) for value in joint]
        rate = EWMA_RATE if number else 1
        prior = [rate * new + (1 - rate) * old for new, old in zip(last, prior, strict=True)]
    return prior


def test_posterior_weights_are_the_naive_cached_prior(workspace: Path, tmp_path: Path) -> None:
    texts = [some_text(tmp_path, "a", 41, 1), some_text(tmp_path, "b", 17, 2)]
    recorder = Recorder()
    config = MergeConfig(method="average", weights="posterior")
    manifest = merge(Layout(workspace), "m", config, validation=lambda: texts, run=MergeRun(reporter=recorder))
    fitted = manifest.merged.weights
    priors = [naive_prior(workspace, text, 100, "last_token") for text in texts]
    assert sum(fitted.values()) == pytest.approx(1, abs=1e-9)
    assert list(fitted.values()) == pytest.approx([sum(shares) / 2 for shares in zip(*priors, strict=True)], abs=1e-5)
    assert manifest.merged.fitted_on == ("a", "b")
    assert recorder.lines[0] == "fitting the prior of 3 experts on 7 blocks of a, b"


def test_posterior_weights_without_information_are_refused(workspace: Path, tmp_path: Path) -> None:
    """As where the validation text of all experts is fitted at once."""
    texts = [some_text(tmp_path, name, 41, number) for number, name in enumerate("abc")]
    config = MergeConfig(method="average", weights="posterior")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "expertctl.merge.planning.weights.fit_priors",
            lambda *_: {name: {"x": 0.34, "y": 0.33, "z": 0.33} for name in "abc"},
        )
        with pytest.raises(UserError, match=r"\(a, b, c\) favours no expert; name the domain .* \(--fit-on\)"):
            merge(Layout(workspace), "m", config, validation=lambda: texts)


def test_a_cached_prior_is_fitted_frozen_and_stored(workspace: Path, tmp_path: Path) -> None:
    texts = [some_text(tmp_path, "a", 60, 3)]
    config = MergeConfig(method="ensemble", options={"samples": 4})
    merge(Layout(workspace), "m", config, validation=lambda: texts)
    stored = json.loads((workspace / "generalists" / "m" / "config.json").read_text())
    expected = naive_prior(workspace, texts[0], 4, "prefix")
    assert stored["mixer_settings"]["prior"] == pytest.approx(expected, abs=1e-5)
    assert stored["mixer_settings"]["domain_priors"] == {"a": pytest.approx(expected, abs=1e-5)}
    model, _ = expertctl.load_model(workspace / "generalists" / "m")
    assert model.mixer.prior.tolist() == pytest.approx(stored["mixer_settings"]["prior"])
    model.target_log_probs(torch.tensor([[4, 5, 6, 7]]))
    assert model.mixer.prior.tolist() == pytest.approx(stored["mixer_settings"]["prior"])


def test_a_text_shorter_than_a_block_is_read_as_it_is(workspace: Path, tmp_path: Path) -> None:
    texts = [some_text(tmp_path, "a", 4, 3, block_size=16)]
    config = MergeConfig(method="average", weights="posterior")
    fitted = merge(Layout(workspace), "m", config, validation=lambda: texts).merged.weights
    assert sum(fitted.values()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("average", {"weights": "posterior"}), ("ensemble", {"options": {"prior": "cached"}})],
)
def test_without_validation_text_there_is_nothing_to_fit_on(
    workspace: Path, method: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="there is none; run `expertctl data prepare`"):
        expertctl.Workspace(workspace).merge("m", method=method, **settings)
    assert not list((workspace / "generalists").glob("*"))


# --- seeds of other shapes ---


def test_a_sharded_seed_is_merged_like_a_whole_one(tmp_path: Path, new_workspace: Any) -> None:
    """The digest does not depend on sharding, so the experts still belong to it."""
    workspace = new_workspace(tmp_path / "ws", EXPERTS, changed="model.layers.*.mlp.*")
    average(workspace, "whole")
    cut_in_two(workspace / "seed")
    average(workspace, "cut")
    whole, cut = (read_manifest(workspace / "generalists" / name) for name in ("whole", "cut"))
    assert whole.digest == cut.digest
    expertctl.Workspace(workspace).merge("e", method="ensemble", options={"prior": "uniform"})
    model, _ = expertctl.load_model(workspace / "generalists" / "e")
    law, _ = expertctl.load_model(workspace / "experts" / "law")
    for name, tensor in model.members[1].state_dict().items():
        assert torch.equal(tensor, law.state_dict()[name])


def cut_in_two(seed: Path) -> None:
    """Shard a seed's weights as transformers does."""
    tensors = load_file(seed / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for number, chosen in enumerate((names[:9], names[9:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, seed / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    (seed / "model.safetensors").unlink()
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (seed / "model.safetensors.index.json").write_text(index)
    manifest = read_manifest(seed)
    digests, files = digests_of_folder(seed)
    assert digests == manifest.tensors
    replace(manifest, files=files).write(seed)
