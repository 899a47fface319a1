"""How routers begin, against plain definitions, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertctl import UserError, load_model
from expertctl.core.hooks.mixtures import RouterInputs, RouterRows
from expertctl.core.hooks.text import ValidationText
from expertctl.core.models.feed_forwards import feed_forwards, input_moments
from expertctl.merge.mixture.mixing import apply_bias
from expertctl.merge.mixture.routing.prompt_starts import prompt_rows, prompt_state_rows, prompt_token_rows, tokens_of
from expertctl.merge.mixture.routing.starts import embedding_rows, hidden_rows, linear_rows, random_rows, uniform_rows
from expertctl.workspace import Workspace


def inputs(folder: Path, experts: dict[str, Path | None] | None = None, **settings: Any) -> RouterInputs:
    return RouterInputs(folder, experts or {"a": folder, "b": folder}, num_layers=2, width=16, **settings)


def blocks(low: int, count: int = 6, size: int = 24) -> Any:
    rows = np.random.default_rng(low).integers(low, low + 80, (count, size + 1))

    class Blocks:
        block_size = size

        def __len__(self) -> int:
            return count

        def block(self, index: int) -> Any:
            return rows[index]

    return Blocks()


def test_moments_are_of_the_inputs_of_feed_forwards(model_folder: Path) -> None:
    model, _ = load_model(model_folder, dtype="float32")
    texts = [np.arange(10), np.arange(50, 57)]
    seen: list[list[torch.Tensor]] = [[], []]
    for layer, part in enumerate(feed_forwards(model)):
        part.module.register_forward_pre_hook(
            lambda module, given, layer=layer: seen[layer].append(given[0][0].double())
        )
    moments = input_moments(model, texts, full=True)
    for layer in range(2):
        x = torch.cat(seen[layer])
        torch.testing.assert_close(moments.mean[layer], x.mean(dim=0))
        torch.testing.assert_close(moments.second[layer], x.T @ x / len(x))
    assert moments.tokens == 17
    diagonal = input_moments(model, texts).second
    torch.testing.assert_close(diagonal, moments.second.diagonal(dim1=1, dim2=2))


def test_a_random_row_depends_on_seed_and_name_alone(model_folder: Path) -> None:
    two = random_rows(inputs(model_folder)).rows
    turned = random_rows(inputs(model_folder, {"b": None, "c": None, "a": None})).rows
    np.testing.assert_array_equal(two[:, 0], turned[:, 2])
    np.testing.assert_array_equal(two[:, 1], turned[:, 0])
    other = random_rows(inputs(model_folder, options={"seed": 1})).rows
    assert not np.array_equal(two, other)
    wide = random_rows(inputs(model_folder, {str(number): None for number in range(500)})).rows
    assert wide.std() == pytest.approx(0.02, rel=0.05)


def test_linear_rows_are_spread_as_torch_spreads_them(model_folder: Path) -> None:
    many = {str(number): None for number in range(500)}
    rows = linear_rows(inputs(model_folder, many)).rows
    fresh = torch.nn.Linear(16, 4000).weight.detach().numpy()
    assert np.abs(rows).max() <= 0.25
    assert rows.std() == pytest.approx(fresh.std(), rel=0.02)
    np.testing.assert_array_equal(rows[:, 7], linear_rows(inputs(model_folder, {"7": None})).rows[:, 0])


def test_uniform_rows_are_zero(model_folder: Path) -> None:
    assert not uniform_rows(inputs(model_folder)).rows.any()


def test_stored_rows_of_experts_are_used_for_them(flexolmo_workspace: Workspace) -> None:
    from safetensors.numpy import load_file

    folders: dict[str, Path | None] = {"public": None}
    folders |= {name: flexolmo_workspace.experts / name for name in ("prose", "means")}
    start = embedding_rows(inputs(flexolmo_workspace.layout.seed, folders))
    assert not start.rows[:, 0].any()
    for number, name in enumerate(("prose", "means"), start=1):
        brought = load_file(flexolmo_workspace.experts / name / "router.safetensors")
        np.testing.assert_array_equal(start.rows[:, number], brought["rows"])
        np.testing.assert_array_equal(start.biases[:, number], brought["biases"])
        unit = (start.unit[:, number] * brought["public"]).sum(axis=-1)
        np.testing.assert_allclose(unit, 1, rtol=1e-5)


def test_an_expert_without_a_row_is_named(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"expert 'a' .* has no router row .*--trains flexolmo"):
        embedding_rows(inputs(model_folder))


def test_prompts_are_means_of_hidden_states_of_length_one(model_folder: Path) -> None:
    own = {
        "a": {"positive_prompts": ["def area():", "return x"], "negative_prompts": ["whereas"]},
        "b": {"positive_prompts": ["Whereas the parties"]},
    }
    rows = prompt_rows(inputs(model_folder, expert_options=own)).rows
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, rtol=1e-5)
    model, tokenizer = load_model(model_folder, dtype="float32")

    def mean(text: str) -> np.ndarray[Any, Any]:
        return input_moments(model, [np.array(tokenizer(text)["input_ids"])]).mean.numpy()

    expected = mean("Whereas the parties")
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(rows[:, 1], expected, rtol=1e-4, atol=1e-5)


PROMPTS = {
    "a": {"positive_prompts": ["def area(width):", "return x"], "negative_prompts": ["whereas the", "x"]},
    "b": {"positive_prompts": ["Whereas the parties"]},
}


@pytest.mark.parametrize("average", [False, True])
def test_states_of_prompts_are_mergekits(model_folder: Path, average: bool) -> None:
    rows = prompt_state_rows(inputs(model_folder, expert_options=PROMPTS, options={"average": int(average)})).rows
    model, tokenizer = load_model(model_folder, dtype="float32")

    def side(prompts: list[str]) -> torch.Tensor:
        states = []
        for text in prompts:
            given = tokenizer((tokenizer.bos_token or "") + text, add_special_tokens=False, return_tensors="pt")
            layers = torch.stack(model(**given, output_hidden_states=True).hidden_states[:-1])[:, 0].double()
            states.append(layers.mean(dim=1) if average else layers[:, -1])
        return torch.stack(states).mean(dim=0)

    for number, texts in enumerate(PROMPTS.values()):
        row = side(texts["positive_prompts"])
        if "negative_prompts" in texts:
            row = row - side(texts["negative_prompts"])
        expected = (row / row.norm(dim=-1, keepdim=True)).detach().numpy()
        np.testing.assert_allclose(rows[:, number], expected, atol=1e-5)


def test_embeddings_of_prompts_are_mergekits(model_folder: Path) -> None:
    rows = prompt_token_rows(inputs(model_folder, expert_options=PROMPTS)).rows
    model, tokenizer = load_model(model_folder, dtype="float32")

    def side(prompts: list[str]) -> torch.Tensor:
        total = torch.zeros(16, dtype=torch.float64)
        for text in prompts:
            given = tokenizer((tokenizer.bos_token or "") + text, add_special_tokens=False, return_tensors="pt")
            total += model.get_input_embeddings()(given["input_ids"])[0].double().sum(dim=0)
        return total / total.norm()

    for number, texts in enumerate(PROMPTS.values()):
        row = side(texts["positive_prompts"])
        if "negative_prompts" in texts:
            row = row - side(texts["negative_prompts"])
        expected = (row / row.norm()).detach().numpy()
        for layer in range(2):
            np.testing.assert_allclose(rows[layer, number], expected, atol=1e-5)


def test_prompts_without_a_token_are_refused() -> None:
    class Tokenizer:
        bos_token = None

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": []}

    with pytest.raises(UserError, match="the prompt 'x' has no tokens; use another prompt"):
        tokens_of(Tokenizer(), "x")


@pytest.mark.parametrize("router", [prompt_rows, prompt_state_rows, prompt_token_rows])
def test_prompts_that_cancel_are_refused(model_folder: Path, router: Any) -> None:
    own = {"a": {"positive_prompts": ["x y"], "negative_prompts": ["x y"]}, "b": {"positive_prompts": ["z"]}}
    with pytest.raises(UserError, match="positive and negative prompts of 'a' cancel out"):
        router(inputs(model_folder, expert_options=own))


@pytest.mark.parametrize(
    ("own", "part"),
    [
        ({"a": {"positive_prompts": ["x"]}}, "needs positive_prompts for 'b'"),
        ({"a": {"positive_prompts": "x"}, "b": {}}, "positive_prompts of 'a' is not a list of nonempty texts"),
    ],
)
def test_prompts_that_are_missing_or_no_texts_are_named(model_folder: Path, own: Any, part: str) -> None:
    with pytest.raises(UserError, match=part):
        prompt_rows(inputs(model_folder, expert_options=own))


def test_discriminants_choose_the_expert_of_the_text(model_folder: Path) -> None:
    texts = [ValidationText("a", blocks(0)), ValidationText("b", blocks(160))]
    start = hidden_rows(
        inputs(model_folder, {"public": None, "a": model_folder, "b": model_folder}, validation=lambda: texts)
    )
    assert not start.rows[:, 0].any()
    router = apply_bias(start, "carry")
    model, _ = load_model(model_folder, dtype="float32")
    for number, text in enumerate(texts, start=1):
        for layer in range(2):
            x = all_inputs(model, text.blocks, layer)
            logits = x @ router.rows[layer].T + router.biases[layer]
            other = 3 - number
            assert (logits[:, number] > logits[:, other]).mean() > 0.8
    folded = apply_bias(start, "fold")
    assert folded.biases is None
    everything = np.concatenate([all_inputs(model, text.blocks, 1) for text in texts])
    np.testing.assert_allclose((everything @ start.unit[1, 0]).mean(), 1, rtol=1e-4)
    assert not np.array_equal(folded.rows, router.rows)


def all_inputs(model: Any, text: Any, layer: int) -> np.ndarray[Any, Any]:
    seen = []
    part = feed_forwards(model)[layer]
    handle = part.module.register_forward_pre_hook(lambda module, given: seen.append(given[0][0].detach()))
    for index in range(len(text)):
        model(input_ids=torch.from_numpy(text.block(index)[None, :-1]))
    handle.remove()
    return torch.cat(seen).numpy()


def test_an_expert_without_text_is_named(model_folder: Path) -> None:
    with pytest.raises(UserError, match="needs validation text of the domain of 'b'"):
        hidden_rows(inputs(model_folder, validation=lambda: [ValidationText("a", blocks(0))]))


@pytest.mark.parametrize(
    ("options", "part"), [({"sed": 1}, "has no option 'sed'"), ({"seed": "x"}, "it must be a number")]
)
def test_options_that_are_not_understood_are_refused(model_folder: Path, options: Any, part: str) -> None:
    with pytest.raises(UserError, match=part):
        random_rows(inputs(model_folder, options=options))


def test_a_bias_is_folded_along_the_unit_direction() -> None:
    rows = np.zeros((1, 2, 3), np.float32)
    unit = np.array([[[1.0, 0, 0], [0, 0.5, 0]]], np.float32)
    start = RouterRows(rows, np.array([[-1.0, -2.0]], np.float32), unit)
    np.testing.assert_allclose(apply_bias(start, "fold").rows, [[[-1, 0, 0], [0, -1, 0]]])
    assert apply_bias(start, "carry").biases is not None
    assert not apply_bias(start, "drop").rows.any()
    with pytest.raises(UserError, match="no direction to fold"):
        apply_bias(RouterRows(rows, start.biases), "fold")
