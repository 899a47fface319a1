"""Stitched models: the hub at first, members that never change, caches, files, members of other shapes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flexolmo_workspaces import OWNERS, make_flexolmo_workspace, tune_here
from transformers import AutoConfig, AutoModelForCausalLM

from expertctl import UserError, Workspace, load_model, register_auto_classes
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.verification import verify
from expertctl.merge.stitched.configuration import StitchedConfig, hub_points, leads_into_hub, matched_points
from expertctl.merge.stitched.container import StitchedForCausalLM
from expertctl.merge.stitched.layers import ExpertsIntoHub, HubIntoExperts
from expertctl.merge.stitched.members import MEMBERS_FOLDER
from expertctl.merge.stitched.stepwise import Stepwise, decoder_layers

TOKENS = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Experts that were trained whole."""
    return make_flexolmo_workspace(tmp_path_factory.mktemp("stitch") / "ws", "olmo2", trains="all")


def stitch(workspace: Workspace, name: str, **options: Any) -> Path:
    folder = workspace.generalists / name
    if not folder.exists():
        workspace.merge(name, method="stitch", options=options)
    return folder


def shaken(folder: Path) -> StitchedForCausalLM:
    """Return a stitched model whose stitches do something."""
    model, _ = load_model(folder)
    assert isinstance(model, StitchedForCausalLM)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.stitches.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(**{"input_ids": TOKENS, **inputs}).logits
    return result


@pytest.mark.parametrize("family", ["olmo2", "llama", "qwen2", "qwen3", "mistral", "gpt2"])
def test_at_first_it_is_the_hub_whatever_the_family(tmp_path: Path, family: str) -> None:
    made = make_flexolmo_workspace(tmp_path / "ws", family, owners=OWNERS[:2], trains="all")
    model, _ = load_model(stitch(made, "stitched"))
    seed, _ = load_model(made.layout.seed)
    torch.testing.assert_close(logits(model), logits(seed), atol=1e-5, rtol=1e-5)
    experts = [load_model(made.experts / name)[0] for name in model.expert_names]
    for expert, inside in zip(experts, model.experts, strict=True):
        assert torch.equal(logits(expert), logits(inside))


def test_a_step_by_step_pass_is_the_models_own(workspace: Workspace) -> None:
    seed, _ = load_model(workspace.layout.seed)
    with torch.inference_mode():
        states = seed(input_ids=TOKENS, output_hidden_states=True).hidden_states
        stepwise = Stepwise(seed)
        stepwise.begin(input_ids=TOKENS, use_cache=False)
        assert torch.equal(stepwise.states, states[0])
        assert torch.equal(stepwise.advance(1), states[1])
        end = seed.model.norm(stepwise.advance(len(decoder_layers(seed))))
    assert torch.equal(end, states[-1])


def test_the_layers_equal_the_papers_formulas() -> None:
    torch.manual_seed(0)
    hub, states = torch.randn(2, 3, 4), {"a": torch.randn(2, 3, 4), "b": torch.randn(2, 3, 6)}
    into = ExpertsIntoHub(4, {"a": 4, "b": 6})
    out = HubIntoExperts(4, {"a": 4, "b": 6})
    torch.nn.init.ones_(into.strength)
    new, projected = into(hub, states)
    gates = torch.stack([into.gates[key](hub) for key in ("hub", "expert_a", "expert_b")]).softmax(dim=0)
    seen = [into.projections[f"expert_{name}"](state) for name, state in states.items()]
    torch.testing.assert_close(new, gates[0] * hub + gates[1] * seen[0] + gates[2] * seen[1])
    torch.testing.assert_close(projected["b"], seen[1])
    given = out(hub, states)
    gate = out.gates["expert_b"](hub).sigmoid()
    torch.testing.assert_close(given["b"], (1 - gate) * states["b"] + gate * out.projections["expert_b"](hub))


@pytest.mark.parametrize(
    ("layers", "stitches", "points"),
    [(20, 4, (5, 10, 15, 20)), (7, 3, (2, 4, 7)), (2, 1, (2,)), (5, 5, (1, 2, 3, 4, 5))],
)
def test_stitches_are_at_equal_depths_the_last_after_all_layers(
    layers: int, stitches: int, points: tuple[int, ...]
) -> None:
    assert hub_points(layers, stitches) == points
    assert [leads_into_hub(number, 4) for number in range(4)] == [False, True, False, True]


def test_depths_are_matched_by_their_share_of_the_whole() -> None:
    assert matched_points((5, 10, 15, 20), "deep", 32) == (8, 16, 24, 32)
    with pytest.raises(UserError, match="expert 'flat' has 3 layers, too few for 4 stitches"):
        matched_points((5, 10, 15, 20), "flat", 3)


def test_a_cache_gives_what_the_whole_text_gives(workspace: Workspace) -> None:
    model = shaken(stitch(workspace, "stitched"))
    whole = logits(model)
    assert (whole - logits(load_model(workspace.layout.seed)[0])).abs().max() > 0.01
    with torch.inference_mode():
        output = model(input_ids=TOKENS[:, :5], use_cache=True)
        parts = [output.logits]
        for place in range(5, TOKENS.shape[1]):
            output = model(
                input_ids=TOKENS[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True
            )
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
    greedy = [
        model.generate(
            TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=4, do_sample=False, use_cache=cached
        )
        for cached in (True, False)
    ]
    assert torch.equal(*greedy)


def test_padding_on_the_left_changes_nothing(workspace: Workspace) -> None:
    model = shaken(stitch(workspace, "stitched"))
    mask = torch.ones_like(TOKENS)
    mask[0, :6] = 0
    padded = logits(model, attention_mask=mask)[0, 6:]
    torch.testing.assert_close(padded, logits(model, input_ids=TOKENS[:1, 6:])[0], atol=1e-4, rtol=1e-4)


def test_only_stitches_train_and_members_stay_to_the_bit(workspace: Workspace) -> None:
    base = stitch(workspace, "stitched")
    folder = tune_here(
        workspace,
        "trained",
        base.name,
        trains="stitches",
        domains=["public", *OWNERS],
        training={"tokens": 1024, "learning_rate": 0.05},
    )
    before, _ = load_model(base)
    after, _ = load_model(folder)
    moved = {
        name: not torch.equal(parameter, dict(after.named_parameters())[name])
        for name, parameter in before.named_parameters()
    }
    assert all(not changed for name, changed in moved.items() if not name.startswith("stitches."))
    assert all(changed for name, changed in moved.items() if name.startswith("stitches.1."))
    assert verify(folder) == []
    manifest = read_manifest(folder)
    assert manifest.merged.kind == "stitched"
    assert manifest.tunings[0].trains == "stitches"
    assert set(manifest.tensors) == {name for name, _ in after.stitches.named_parameters(prefix="stitches")}


def test_only_stitches_have_gradients(workspace: Workspace) -> None:
    model = shaken(stitch(workspace, "stitched"))
    model(input_ids=TOKENS).logits.square().mean().backward()
    having = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert having == {name for name, _ in model.stitches.named_parameters(prefix="stitches")}


def test_an_expert_is_switched_off(workspace: Workspace) -> None:
    folder = stitch(workspace, "stitched")
    model = shaken(folder)
    whole = logits(model)
    model.without(["prose"])
    assert model.expert_names == [name for name in sorted(OWNERS) if name != "prose"]
    assert not torch.allclose(logits(model), whole)
    alone, _ = load_model(folder, without=OWNERS)
    assert torch.equal(logits(alone), logits(load_model(workspace.layout.seed)[0]))


def test_one_that_was_trained_warns_that_the_stitches_have_seen_the_expert(workspace: Workspace) -> None:
    base = stitch(workspace, "stitched")
    folder = tune_here(
        workspace, "trained-once", base.name, trains="stitches", domains=["public"], training={"tokens": 256}
    )
    with pytest.warns(UserWarning, match="trainer 'stitches' ran on public while 'prose' was one"):
        load_model(folder, without=["prose"])


def test_members_of_other_widths_and_depths_join(workspace: Workspace, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(workspace.layout.seed)
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 24, 4, 20
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    for file in workspace.layout.seed.glob("tokenizer*"):
        shutil.copy(file, other)
    workspace.merge("mixed", method="stitch", experts=["prose", str(other)])
    model = shaken(workspace.generalists / "mixed")
    assert model.expert_names == ["prose", "other"]
    assert logits(model).shape == (*TOKENS.shape, config.vocab_size)
    manifest = read_manifest(workspace.generalists / "mixed")
    assert [(parent.kind, parent.name) for parent in manifest.parents][1:] == [("expert", "prose"), ("model", "other")]
    with pytest.raises(UserError, match="'other' has width 24 and the hub 16"):
        workspace.merge("z", method="stitch", experts=["prose", str(other)], options={"projected": True})


def test_a_self_contained_model_needs_no_other_folder(workspace: Workspace, tmp_path: Path) -> None:
    folder = stitch(workspace, "whole", self_contained=True)
    assert not (folder / MEMBERS_FOLDER / "prose" / "run.json").exists()
    expected = logits(load_model(folder)[0])
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert torch.equal(logits(load_model(moved)[0]), expected)
    assert verify(moved) == []


def test_referenced_members_must_exist_unchanged(workspace: Workspace, tmp_path: Path) -> None:
    root = shutil.copytree(workspace.root, tmp_path / "copy")
    made = Workspace(root)
    folder = stitch(made, "stitched")
    expert = made.experts / "prose"
    expert.rename(made.experts / "away")
    with pytest.raises(UserError, match=r"references member 'prose' in .* which does not exist"):
        load_model(folder)
    shutil.copytree(made.experts / "chance", expert)
    with pytest.raises(UserError, match="has changed since the merge"):
        load_model(folder)


def test_transformers_loads_its_own_save(workspace: Workspace, tmp_path: Path) -> None:
    model = shaken(stitch(workspace, "stitched"))
    model.without(["means"])
    model.save_pretrained(tmp_path / "saved")
    register_auto_classes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("projected", [False, True])
def test_experts_continue_from_their_own_states_or_the_hubs(projected: bool) -> None:
    settings = AutoConfig.for_model(
        "llama", vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    torch.manual_seed(0)
    hub, expert = (AutoModelForCausalLM.from_config(settings).eval() for _ in range(2))
    members = [{"name": name, "width": 16, "num_layers": 3} for name in ("hub", "law")]
    config = StitchedConfig(settings.to_dict(), members, num_stitches=3, projected=projected)
    model = StitchedForCausalLM(config, hub, {"law": expert}).eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.stitches[0].projections["expert_law"].weight)
        model.stitches[2].strength.fill_(1.0)
        model.stitches[2].gates["expert_law"].bias.fill_(50.0)  # the hub ends with the expert's states
        model.stitches[1].gates["expert_law"].bias.fill_(-50.0)
        stepwise = Stepwise(expert)
        stepwise.begin(input_ids=TOKENS, use_cache=False)
        states = stepwise.advance(1)
        if projected:
            stepwise.states = model.stitches[0].projections["expert_law"](states)
        expected = hub.lm_head(hub.model.norm(stepwise.advance(3)))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_an_expert_shares_what_it_did_not_change(tmp_path: Path) -> None:
    made = make_flexolmo_workspace(tmp_path / "ws", "llama", owners=OWNERS[:1], trains="feed_forward")
    model, _ = load_model(stitch(made, "stitched"))
    hub, expert = model.hub.model.layers[0], model.experts[0].model.layers[0]
    assert hub.self_attn.q_proj.weight.data_ptr() == expert.self_attn.q_proj.weight.data_ptr()
    assert hub.mlp.up_proj.weight.data_ptr() != expert.mlp.up_proj.weight.data_ptr()
