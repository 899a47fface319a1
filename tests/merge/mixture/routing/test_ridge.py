"""The ridge regression router, against a plain solution on all hidden states at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changed_mixtures import merge
from flexolmo_workspaces import OWNERS
from mixtures_of_copies import copies
from numpy.typing import NDArray
from safetensors.numpy import load_file
from separable_domains import WORDS, make_separable_workspace

from expertctl import UserError, load_model
from expertctl.core.hooks.mixtures import RouterInputs
from expertctl.core.hooks.text import ValidationText
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.verification import verify
from expertctl.core.models.feed_forwards import spread_blocks
from expertctl.merge.merging import plan_recipe
from expertctl.merge.mixture.opened import open_mixture
from expertctl.merge.mixture.routing.log import routers_of
from expertctl.merge.mixture.routing.report import routing_of
from expertctl.merge.mixture.routing.ridge import measure_expert, ridge_rows, solve_ridge
from expertctl.merge.recipes.recipe import Recipe, whole_models
from expertctl.workspace import Workspace

SAMPLES, RIDGE = 4, 0.05
ROUTER_OPTIONS = {"samples": SAMPLES, "ridge": RIDGE, "temperature": 1}
ROUTER = {"router": "ridge", "router_options": ROUTER_OPTIONS}


def router_inputs(folder: Path, number: int, blocks: list[NDArray[Any]]) -> list[NDArray[np.float64]]:
    """Return what the routers of a mixture receive, a (tokens, d) array a layer, if all text is routed to one expert."""
    model, _ = load_model(folder, dtype="float32")
    seen: list[list[NDArray[np.float64]]] = []
    for router in routers_of(model).values():
        seen.append([])

        def forward(hidden: torch.Tensor, router: Any = router, states: Any = seen[-1]) -> Any:
            flat = hidden.reshape(-1, hidden.shape[-1])
            states.append(flat.double().numpy())
            chosen = torch.tensor([[number, (number + 1) % router.weight.shape[0]]]).expand(len(flat), 2)
            gates = torch.tensor([[1.0, 0.0]]).expand(len(flat), 2)
            return flat @ router.weight.T, gates, chosen

        router.forward = forward
    with torch.inference_mode():
        for block in blocks:
            model(input_ids=torch.from_numpy(block[None]), use_cache=False)
    return [np.concatenate(states) for states in seen]


def plain_solution(folder: Path, texts: list[list[NDArray[Any]]], *, bias: bool) -> list[NDArray[np.float64]]:
    """Return (d (+ 1), E) of each layer: the regression on one matrix of all tokens."""
    states = [router_inputs(folder, number, blocks) for number, blocks in enumerate(texts)]
    solutions = []
    for layers in zip(*states, strict=True):
        inputs = np.concatenate(layers)
        width = inputs.shape[1]
        labels = np.repeat(np.eye(len(layers)), [len(layer) for layer in layers], axis=0)
        penalty = RIDGE * (inputs**2).sum() / width
        if bias:
            inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
        solution = np.linalg.solve(inputs.T @ inputs + penalty * np.eye(inputs.shape[1]), inputs.T @ labels)
        solutions.append(solution / np.linalg.norm(solution[:width], axis=0))
    return solutions


def texts_of(workspace: Workspace) -> list[list[NDArray[Any]]]:
    return [spread_blocks(text.blocks, SAMPLES) for text in workspace.data.validation(OWNERS)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mixture", {}),
        ("mixture", {"target": "container"}),
        ("mixture", {"target": "container", "bias": "carry"}),
        ("btx", {}),
        ("btx", {"layout": "fused"}),
    ],
    ids=str,
)
def test_rows_are_those_of_a_regression_on_all_tokens(
    flexolmo_workspace: Workspace, method: str, options: dict[str, Any]
) -> None:
    name = f"ridge-{method}-{'-'.join(map(str, options.values()))}"
    folder = merge(flexolmo_workspace, name, OWNERS, method=method, options={**ROUTER, **options})
    router = open_mixture(folder).router
    bias = options.get("bias") == "carry"
    assert (router.biases is not None) == bias
    for layer, solution in enumerate(plain_solution(folder, texts_of(flexolmo_workspace), bias=bias)):
        width = router.rows.shape[2]
        np.testing.assert_allclose(router.rows[layer].T, solution[:width], atol=2e-5)
        if router.biases is not None:
            np.testing.assert_allclose(router.biases[layer], solution[width], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(router.rows, axis=-1), 1, rtol=1e-6)
    assert verify(folder) == []
    manifest = read_manifest(folder)
    assert manifest.merged.fitted_on == tuple(sorted(OWNERS))
    assert {f"router/{owner}/products" for owner in OWNERS} <= manifest.tensors.keys()


def test_text_goes_to_the_expert_of_its_domain(tmp_path: Path) -> None:
    """On the training text, which the router has not seen; a third by chance."""
    workspace = make_separable_workspace(tmp_path / "separable")
    names = tuple(WORDS)
    for method in ("mixture", "btx"):
        folder = merge(workspace, method, names, method=method, options={"router": "ridge", "top_k": 1})
        model, _ = load_model(folder, dtype="float32")
        for number, prepared in enumerate(workspace.data.prepare(names)):
            blocks = spread_blocks(workspace.data.blocks(prepared, "train"), 16)
            by_layer = [layer[number] for layer in routing_of(model, blocks).load]
            assert min(by_layer) > 0.5, (method, prepared.name, by_layer)


def test_the_seeds_own_expert_takes_the_text_of_no_expert(flexolmo_workspace: Workspace) -> None:
    unlabelled = merge(flexolmo_workspace, "ridge-public-0", OWNERS, method="flexolmo", options=ROUTER)
    assert not open_mixture(unlabelled).router.rows[:, 0].any()
    assert not (unlabelled / "router" / "public.safetensors").exists()
    labelled = merge(
        flexolmo_workspace, "ridge-public-1", OWNERS, options=ROUTER, fit_on=("public", *OWNERS), method="flexolmo"
    )
    np.testing.assert_allclose(np.linalg.norm(open_mixture(labelled).router.rows, axis=-1), 1, rtol=1e-6)
    tokens = load_file(labelled / "router" / "public.safetensors")["tokens"]
    assert tokens == sum(map(len, spread_blocks(flexolmo_workspace.data.validation(["public"])[0].blocks, SAMPLES)))


def test_statistics_are_stored_only_if_wanted(flexolmo_workspace: Workspace) -> None:
    options = {"router": "ridge", "router_options": {**ROUTER_OPTIONS, "store": 0}}
    bare = merge(flexolmo_workspace, "ridge-bare", OWNERS, method="mixture", options=options)
    whole = merge(flexolmo_workspace, "ridge-mixture-", OWNERS, method="mixture", options=ROUTER)
    assert not (bare / "router").exists()
    assert (bare / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_sum_of_statistics_is_that_of_all_text(model_folder: Path) -> None:
    model, _ = load_model(model_folder, dtype="float32")
    blocks = [np.arange(begin, begin + 20) for begin in range(0, 200, 20)]
    parts = [measure_expert(model, blocks[:4]), measure_expert(model, blocks[4:])]
    whole = measure_expert(model, blocks)
    for name in whole:
        np.testing.assert_allclose(parts[0][name] + parts[1][name], whole[name], rtol=1e-5, atol=1e-3)
    rows, _ = solve_ridge(parts, 0.1, has_bias=False)
    turned, _ = solve_ridge(parts[::-1], 0.1, has_bias=False)
    np.testing.assert_allclose(rows, turned[:, ::-1], rtol=1e-9)


def test_temperature_divides_the_rows(model_folder: Path) -> None:
    model, _ = load_model(model_folder, dtype="float32")
    statistics = {name: measure_expert(model, [np.arange(begin, begin + 50)]) for name, begin in (("a", 0), ("b", 150))}
    warm, cold = (
        ridge_rows(
            RouterInputs(
                model_folder,
                {"a": model_folder, "b": model_folder},
                num_layers=2,
                width=16,
                options={"temperature": temperature},
                statistics=statistics,
            )
        )
        for temperature in (1, 0.1)
    )
    np.testing.assert_allclose(cold.rows, warm.rows * 10, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"ridge": 0}, "'ridge' of router start 'ridge' is 0; it must be greater than 0"),
        ({"temperature": -1}, "'temperature' of router start 'ridge' is -1"),
        ({"samples": 0}, "'samples' of router start 'ridge' is 0; it must be at least 1"),
        ({"lambda": 1}, "has no option 'lambda'; it has samples, ridge"),
    ],
)
def test_wrong_options_are_refused_before_any_text_is_read(
    model_folder: Path, options: dict[str, Any], part: str
) -> None:
    def validation() -> list[ValidationText]:
        raise AssertionError("text is read")

    with pytest.raises(UserError, match=part):
        ridge_rows(
            RouterInputs(
                model_folder, {"a": model_folder}, num_layers=2, width=16, options=options, validation=validation
            )
        )


def test_an_expert_without_text_is_named_before_any_is_run(model_folder: Path) -> None:
    class Blocks:
        block_size = 8

        def __len__(self) -> int:
            return 1

        def block(self, index: int) -> NDArray[Any]:
            return np.arange(9)

    texts: Any = [ValidationText("a", Blocks())]  # type: ignore[arg-type]
    experts: dict[str, Path | None] = {"a": model_folder, "b": model_folder}
    with pytest.raises(UserError, match="'ridge' needs validation text of the domain of 'b'"):
        ridge_rows(RouterInputs(model_folder, experts, num_layers=2, width=16, validation=lambda: texts))


def test_experts_with_other_vocabularies_are_refused(tmp_path: Path) -> None:
    models = copies(tmp_path, "llama", 2)
    names = tuple(name for name in models if name != "base")
    recipe = Recipe(
        method="mixture",
        models=models,
        slices=whole_models(names),
        seed="base",
        scopes=({"router": "ridge"},),
        pad_to_multiple_of=1024,
    )
    with pytest.raises(UserError, match=r"router 'ridge' runs every expert .* have different vocabularies"):
        plan_recipe(recipe, tmp_path / "mixed")


def test_a_shared_expert_is_refused(tmp_path: Path) -> None:
    models = copies(tmp_path, "qwen2", 3)
    first, *others = (name for name in models if name != "base")
    slices = whole_models((first, *others), {first: {"shared_expert": True}})
    recipe = Recipe(method="mixture", models=models, slices=slices, seed="base", scopes=({"router": "ridge"},))
    with pytest.raises(UserError, match=rf"'ridge' routes all tokens .* through the shared expert '{first}' as well"):
        plan_recipe(recipe, tmp_path / "mixed")
