"""DEMix: every sequence through its domain's feed-forwards, a model of shared layers, domains that join and leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flexolmo_workspaces import make_flexolmo_workspace, tune_here
from safetensors.torch import load_file

from expertctl import Row, UserError, load_model
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.hooks.training import TrainingContext, TrainingText
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.verification import verify
from expertctl.core.text.block_order import BalancedUnion
from expertctl.experts.training.steps.loop import TrainingLoop
from expertctl.merge.generalists.card import model_card
from expertctl.merge.mixture.absence import find_own_expert
from expertctl.merge.mixture.changing import Change
from expertctl.merge.remaking.expert_changes import change_experts
from expertctl.plugins.methods.demix.domain_feed_forwards import set_domains, split_by_domain
from expertctl.plugins.methods.demix.plugin import DemixTraining, prepare
from expertctl.workspace import Workspace

TOKENS = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(0))
DOMAINS = ["prose", "chance"]


def adapt(
    workspace: Workspace,
    model: str,
    *,
    base: str = "demix",
    domains: tuple[str, ...] = ("means",),
    **options: Any,
) -> Path:
    """Let one more expert train in a DEMix model, and return the folder of the new one."""
    return tune_here(
        workspace,
        model,
        base,
        trains="demix_dapt",
        domains=list(domains),
        options={"samples": 2, **options},
        training={"tokens": 256},
    )


@pytest.fixture(scope="module")
def demix(flexolmo_workspace: Workspace) -> Path:
    return tune_here(flexolmo_workspace, "demix", "seed", trains="demix", domains=DOMAINS, training={"tokens": 512})


def test_rows_pass_through_the_feed_forwards_of_their_domain(model_folder: Path) -> None:
    model, _ = load_model(model_folder, dtype="float32")
    parts = split_by_domain(model, 2)
    with torch.no_grad():
        for part in parts:
            for parameter in part.experts[1].parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    set_domains(parts, [0, 1, 1, 0])
    mixed = model(input_ids=TOKENS).logits
    for domain, rows in ((0, [0, 3]), (1, [1, 2])):
        set_domains(parts, [domain])
        torch.testing.assert_close(model(input_ids=TOKENS[rows]).logits, mixed[rows], atol=1e-5, rtol=1e-5)
    seed, _ = load_model(model_folder, dtype="float32")
    set_domains(parts, [0])
    torch.testing.assert_close(model(input_ids=TOKENS).logits, seed(input_ids=TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_gradients_reach_a_domains_own_feed_forward_only(model_folder: Path) -> None:
    model, _ = load_model(model_folder, dtype="float32")
    parts = split_by_domain(model, 2)
    set_domains(parts, [1])
    model(input_ids=TOKENS).logits.square().mean().backward()
    for part in parts:
        assert all(weight.grad is None for weight in part.experts[0].parameters())
        assert all(weight.grad is not None for weight in part.experts[1].parameters())
    assert model.get_input_embeddings().weight.grad is not None


class Text:
    """A domain of `count` blocks of random tokens."""

    block_size = 16

    def __init__(self, count: int, seed: int) -> None:
        self.rows = np.random.default_rng(seed).integers(0, 250, (count, self.block_size + 1))

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        return Row(self.rows[index])


def demix_loop(model_folder: Path, batch_size: int, num_domains: int, **settings: Any) -> TrainingLoop:
    model, _ = load_model(model_folder, dtype="float32")
    texts = [Text(3 + number, number) for number in range(num_domains)]
    names = {f"d{number}": text for number, text in enumerate(texts)}
    text: Any = TrainingText(names, names.__getitem__, (), model_folder)
    steps_blocks = batch_size * settings.get("accumulation", 1)
    part = prepare(TrainingContext(model, DemixTraining(), text, steps_blocks))
    config = TrainingConfig(
        tokens=steps_blocks * Text.block_size * 12,
        sequence_length=Text.block_size,
        batch_size=batch_size,
        weight_decay=0.1,
        warmup=0,
        device="cpu",
        **settings,
    )
    return TrainingLoop(part, BalancedUnion(texts), config)


def feed_forward_weights(loop: TrainingLoop, domain: int) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone() for name, parameter in loop.parameters.items() if f".experts.{domain}." in name
    }


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (1, 2), (4, 1)])
def test_networks_without_tokens_stay_and_domains_get_equal_tokens(
    model_folder: Path, batch_size: int, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through several epochs, with momentum and weight decay."""
    num_domains = 3
    loop = demix_loop(model_folder, batch_size, num_domains, accumulation=accumulation)
    drawn: list[int] = []
    begin = loop.part.begin_batch
    monkeypatch.setattr(loop.part, "begin_batch", lambda domains: (drawn.extend(domains), begin(domains)))
    before = [feed_forward_weights(loop, domain) for domain in range(num_domains)]
    for _ in loop.steps():
        in_step = set(drawn[-batch_size * accumulation :])
        for domain in range(num_domains):
            after = feed_forward_weights(loop, domain)
            moved = [name for name in after if not torch.equal(after[name], before[domain][name])]
            assert len(moved) == (len(after) if domain in in_step else 0), (domain, in_step)
            before[domain] = after
        if len(drawn) % num_domains == 0:
            assert len({drawn.count(domain) for domain in range(num_domains)}) == 1
    assert len(drawn) == batch_size * accumulation * 12


def test_a_step_without_all_domains_is_noted(model_folder: Path) -> None:
    (note,) = demix_loop(model_folder, 2, 3).part.notes
    assert note.startswith(
        "a step has 2 blocks, and there are 3 domains: each feed-forward network is trained in 2 of 3"
    )
    assert demix_loop(model_folder, 3, 3).part.notes == ()
    assert demix_loop(model_folder, 2, 3, accumulation=2).part.notes == ()


def test_the_result_is_an_ensemble_that_shares_all_but_feed_forwards(
    flexolmo_workspace: Workspace, demix: Path
) -> None:
    seed = load_file(flexolmo_workspace.layout.seed / "model.safetensors")
    shared = load_file(demix / "seed" / "model.safetensors")
    own = {name: load_file(demix / "experts" / f"{name}.safetensors") for name in DOMAINS}
    assert shared.keys() == {name for name in seed if ".mlp." not in name}
    for tensors in own.values():
        assert tensors.keys() == {name for name in seed if ".mlp." in name}
    assert any(not torch.equal(shared[name], seed[name]) for name in shared)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(own["prose"][name], own["chance"][name])
    assert verify(demix) == []
    manifest = read_manifest(demix)
    assert manifest.merged.kind == "ensemble"
    assert set(manifest.metrics["validation_loss"]) == set(DOMAINS)
    model, _ = load_model(demix, dtype="float32")
    assert model.expert_names == DOMAINS
    assert model.members[0].model.norm.weight.data_ptr() == model.members[1].model.norm.weight.data_ptr()
    assert torch.isfinite(model(input_ids=TOKENS).logits).all()


def test_a_domain_joins_by_its_feed_forward_alone(flexolmo_workspace: Workspace, demix: Path) -> None:
    joined = adapt(flexolmo_workspace, "demix-more")
    model, _ = load_model(joined, dtype="float32")
    assert model.expert_names == [*DOMAINS, "means"]
    for place in ("seed/model.safetensors", *(f"experts/{name}.safetensors" for name in DOMAINS)):
        assert (joined / place).read_bytes() == (demix / place).read_bytes()
    start = read_manifest(joined).tunings[-1].copied_from["means"]
    assert start in DOMAINS
    own, origin = (load_file(joined / "experts" / f"{name}.safetensors") for name in ("means", start))
    assert own.keys() == origin.keys()
    assert all(not torch.equal(own[name], origin[name]) for name in own)
    assert verify(joined) == []


def test_a_domain_leaves_and_the_shared_layers_are_said_to_have_seen_it(demix: Path, tmp_path: Path) -> None:
    manifest = change_experts(demix, tmp_path / "smaller", Change(remove=("prose",)))
    assert verify(tmp_path / "smaller") == []
    model, _ = load_model(tmp_path / "smaller", dtype="float32")
    assert model.expert_names == ["chance"]
    assert not (tmp_path / "smaller" / "experts" / "prose.safetensors").exists()
    assert list(manifest.tunings[0].experts) == list(DOMAINS)
    assert manifest.history[0].expert == "prose"
    with pytest.warns(UserWarning, match="while 'prose' was one of the experts"):
        switched, _ = load_model(demix, dtype="float32", without=["prose"])
    torch.testing.assert_close(switched(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_ensembles_of_whole_experts_shrink_too(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    folder = flexolmo_workspace.generalists / "trees"
    if not folder.exists():
        weights = {"prose": 0.5, "chance": 0.3, "means": 0.2}
        flexolmo_workspace.merge("trees", method="ensemble", experts=list(weights), weights=weights)
    manifest = change_experts(folder, tmp_path / "smaller", Change(remove=("chance",)))
    assert manifest.merged.weights == pytest.approx({"prose": 5 / 7, "means": 2 / 7})
    model, _ = load_model(tmp_path / "smaller", dtype="float32")
    switched, _ = load_model(folder, dtype="float32", without=["chance"])
    torch.testing.assert_close(switched(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    with pytest.raises(UserError, match="because its prior is fitted; merge again"):
        change_experts(folder, tmp_path / "larger", Change(add={"x": tmp_path}))


def test_impossible_settings_of_demix_are_refused(flexolmo_workspace: Workspace, demix: Path) -> None:
    with pytest.raises(UserError, match="name two or more domains"):
        tune_here(flexolmo_workspace, "one", "seed", trains="demix", domains=["prose"])
    with pytest.raises(UserError, match="outside the feed-forward networks, and 'seed' is not one"):
        adapt(flexolmo_workspace, "none", base="seed", domains=("prose",))
    with pytest.raises(UserError, match="already has an expert 'prose'"):
        adapt(flexolmo_workspace, "twice", domains=("prose",))
    for name in ("../../evil", "a/b", "a,b", "seed", "public", ""):
        with pytest.raises(UserError, match="an expert cannot be called"):
            adapt(flexolmo_workspace, "named", name=name)
    with pytest.raises(UserError, match="needs a name; add --option name=NAME"):
        adapt(flexolmo_workspace, "two", domains=("means", "public"))
    with pytest.raises(UserError, match="samples is 0; it must be at least 1"):
        adapt(flexolmo_workspace, "few", samples=0)
    with pytest.raises(UserError, match="demix needs a dense model, and 'demix' already has several"):
        tune_here(flexolmo_workspace, "again", "demix", trains="demix", domains=["prose", "means"])
    for refused in ("one", "twice", "named", "two"):
        assert not (flexolmo_workspace.generalists / refused).exists(), "nothing stands in the way of another try"


def test_an_expert_that_trained_inside_is_proved_by_the_manifest(
    flexolmo_workspace: Workspace, demix: Path, tmp_path: Path
) -> None:
    joined = adapt(flexolmo_workspace, "demix-traced", name="sums")
    origin = read_manifest(joined).tunings[-1].copied_from["sums"]
    (other,) = set(DOMAINS) - {origin}
    inside = find_own_expert(joined, "prose")  # not the artefact of that name, which has nothing to do with it
    assert inside is not None
    assert inside.merged == "'prose' is one of its experts"
    assert find_own_expert(flexolmo_workspace.layout.seed, "prose") is None
    change_experts(joined, tmp_path / "less", Change(remove=(origin,)))
    left = find_own_expert(tmp_path / "less", origin)
    assert left is not None
    assert left.merged is None
    assert f"'sums' started as a copy of '{origin}'" in left.traces
    assert any("trainer 'demix' ran on" in trace for trace in left.traces)
    assert not any("started as a copy" in trace for trace in find_own_expert(joined, other).traces)
    back = change_experts(joined, tmp_path / "back", Change(remove=("sums",)))
    assert back.digest == read_manifest(demix).digest
    assert [tuning.left for tuning in back.tunings] == [False, True]
    assert "means" not in model_card(back), "its text has left with it"
    asked = find_own_expert(tmp_path / "back", "sums")
    assert asked is not None
    assert (asked.merged, asked.trained_inside) == (None, True)
    assert [trace for trace in asked.traces if "left on" in trace] == list(asked.traces)


def test_copies_of_copies_are_traced_to_the_first(flexolmo_workspace: Workspace, demix: Path, tmp_path: Path) -> None:
    base = "demix"
    for name in ("second", "third"):  # of the same text, to which the second is the nearest once it is there
        adapt(flexolmo_workspace, f"demix-{name}", base=base, name=name)
        base = f"demix-{name}"
    folder = flexolmo_workspace.generalists / base
    tuned = read_manifest(folder).tunings
    assert tuned[2].copied_from == {"third": "second"}
    (origin,) = tuned[1].copied_from.values()
    change_experts(folder, tmp_path / "less", Change(remove=("second", origin)))
    left = find_own_expert(tmp_path / "less", origin)
    assert left is not None
    assert f"'third' started as a copy of '{origin}'" in left.traces


def test_experts_with_attention_of_their_own_are_no_place_for_a_newcomer(tmp_path: Path) -> None:
    workspace = make_flexolmo_workspace(tmp_path / "whole", "llama", owners=("prose", "means"), trains="all")
    workspace.merge("forest", method="ensemble", experts=["prose", "means"], weights={"prose": 1, "means": 1})
    with pytest.raises(UserError, match="outside the feed-forward networks, and 'forest' is not one"):
        tune_here(workspace, "more", "forest", trains="demix_dapt", domains=["public"])
    assert not (workspace.generalists / "more").exists()
