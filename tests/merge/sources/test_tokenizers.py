"""Tokenizers in a merge: policies for different tokenizers, and rows looked up by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from toy_models import random_tensors, recipe, tensors_of, write_model

from expertctl.core.artefacts.files import read_json
from expertctl.core.errors import UserError
from expertctl.merge.merging import merge_recipe
from expertctl.merge.recipes.recipe import Recipe, TokenSource
from expertctl.merge.sources.tokenizers import (
    ModelVocabulary,
    chat_template,
    plan_vocabulary,
    write_tokenizer,
)

TEXT = ["the law of the land", "a code of honour", "to be or not to be"]


def tokenizer(folder: Path, added: tuple[str, ...] = (), text: list[str] = TEXT, size: int = 60) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False))
    made.add_tokens([AddedToken(token) for token in added])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def vocabulary(folder: Path, rows: int = 0) -> ModelVocabulary:
    plain = ModelVocabulary(folder.name, folder, 0)
    return ModelVocabulary(folder.name, folder, rows or len(plain.tokens))


def test_the_same_tokenizer_in_another_layout_passes(tmp_path: Path) -> None:
    first, second = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b")
    content = read_json(second / "tokenizer.json")
    content["truncation"] = {"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (second / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert plan_vocabulary(vocabulary(first), {"b": vocabulary(second)}, "refuse") is None


def test_different_tokenizers_are_refused_with_both_sides_and_the_policies(tmp_path: Path) -> None:
    first, second = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b", ("<law>", "<med>"))
    with pytest.raises(UserError) as caught:
        plan_vocabulary(vocabulary(first), {"b": vocabulary(second)}, "refuse")
    size = len(vocabulary(first).tokens)
    message = str(caught.value)
    assert f"{size:,} and {size + 2:,} tokens, 2 of them different ('<law>' is missing and {size}" in message
    assert "--tokenizer base, union" in message
    with pytest.raises(UserError, match=r"no tokenizer policy .unoin. .did you mean .union."):
        plan_vocabulary(vocabulary(first), {"b": vocabulary(second)}, "unoin")


def test_padding_that_differs_is_told(tmp_path: Path) -> None:
    first, second = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b")
    with pytest.raises(UserError, match="the same tokens, but 64 and 128 embedding rows"):
        plan_vocabulary(vocabulary(first, 64), {"b": vocabulary(second, 128)}, "refuse")


def test_a_union_takes_added_rows_from_those_that_have_them(tmp_path: Path) -> None:
    """One token in one expert only, one in both with other rows and numbers."""
    a, b, c = (
        tokenizer(tmp_path / name, added) for name, added in (("a", ()), ("b", ("<law>", "<both>")), ("c", ("<both>",)))
    )
    size = len(vocabulary(a).tokens)
    plan = plan_vocabulary(vocabulary(a), {"b": vocabulary(b), "c": vocabulary(c)}, "union")
    assert plan is not None
    assert {token: entry["id"] for token, entry in plan.added.items()} == {"<law>": size, "<both>": size + 1}
    assert plan.size == size + 2
    own = {
        "a": np.zeros((size, 3), "f4"),
        "b": np.full((size + 2, 3), 2, "f4"),
        "c": np.full((size + 1, 3), 4, "f4"),
    }
    rows = plan.rearrange(own)
    for name in own:
        assert rows[name].shape == (size + 2, 3)
        np.testing.assert_array_equal(rows[name][:size], own[name][:size])
        np.testing.assert_array_equal(rows[name][size], [2, 2, 2])
    for name, expected in (("a", 3), ("b", 2), ("c", 4)):  # their own rows, and the mean where there is none
        np.testing.assert_array_equal(rows[name][size + 1], [expected] * 3)


def test_padding_is_used_up_before_the_embedding_grows(tmp_path: Path) -> None:
    a, b = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b", ("<law>",))
    plan = plan_vocabulary(vocabulary(a, 64), {"b": vocabulary(b, 64)}, "union")
    assert plan is not None
    assert plan.size == 64
    many = tokenizer(tmp_path / "c", tuple(f"<{number}>" for number in range(64)))
    grown = plan_vocabulary(vocabulary(a, 64), {"c": vocabulary(many, 128)}, "union")
    assert grown is not None
    assert grown.size % 64 == 0
    assert grown.size >= len(vocabulary(a).tokens) + 64


def test_base_looks_rows_up_by_token(tmp_path: Path) -> None:
    """Trained on other text: the same words under other numbers, some missing."""
    a, b = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b", text=["not to be", "the code"])
    first, second = vocabulary(a), vocabulary(b)
    plan = plan_vocabulary(first, {"b": second}, "base")
    assert plan is not None
    assert plan.size == first.rows
    own = {
        "a": np.arange(first.rows, dtype="f4")[:, None],
        "b": 1000 + np.arange(second.rows, dtype="f4")[:, None],
    }
    rows = plan.rearrange(own)
    for token, row in first.tokens.items():
        expected = 1000 + second.tokens[token] if token in second.tokens else row
        assert rows["b"][row, 0] == expected
        assert rows["a"][row, 0] == row
    with pytest.raises(UserError, match="cannot be united: they differ in their 'model'"):
        plan_vocabulary(first, {"b": second}, "union")


def test_single_tokens_may_come_from_a_model(tmp_path: Path) -> None:
    a, b = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b")
    first, second = vocabulary(a), vocabulary(b)
    row = first.tokens["the"]
    own = {"a": np.zeros((first.rows, 1), "f4"), "b": np.ones((second.rows, 1), "f4")}
    forced = plan_vocabulary(first, {"b": second}, "base", {"the": TokenSource("b", force=True)})
    assert forced is not None
    assert forced.rearrange(own)["a"][row, 0] == 1
    gentle = plan_vocabulary(first, {"b": second}, "base", {"the": TokenSource("b")})
    assert gentle is not None
    assert gentle.rearrange(own)["a"][row, 0] == 0
    with pytest.raises(UserError, match="no token 'teh'"):
        plan_vocabulary(first, {"b": second}, "base", {"teh": TokenSource("b")})


def test_a_multiple_is_padded_to(tmp_path: Path) -> None:
    a = tokenizer(tmp_path / "a")
    plan = plan_vocabulary(vocabulary(a), {}, "base", {}, 128)
    assert plan is not None
    assert plan.size == 128
    padded = plan.rearrange({"a": np.ones((vocabulary(a).rows, 2), "f4")})["a"]
    assert padded[vocabulary(a).rows :].sum() == 0


def test_written_files_differ_from_their_source_only_as_declared(tmp_path: Path) -> None:
    a, b = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b", ("<law>",))
    plan = plan_vocabulary(vocabulary(a), {"b": vocabulary(b)}, "union")
    for name, used in (("same", None), ("more", plan)):
        (tmp_path / name).mkdir()
        write_tokenizer(used, a, tmp_path / name)
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()
    content, source = read_json(tmp_path / "more" / "tokenizer.json"), read_json(a / "tokenizer.json")
    assert content["added_tokens"][:-1] == source["added_tokens"]
    assert content["added_tokens"][-1]["content"] == "<law>"
    assert {**content, "added_tokens": []} == {**source, "added_tokens": []}
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "more" / "tokenizer.json"))
    assert loaded.encode("the <law>")[-1] == len(vocabulary(a).tokens)


def test_a_chat_template_is_the_most_common_or_the_given_text(tmp_path: Path) -> None:
    folders = {name: tokenizer(tmp_path / name) for name in "abc"}
    assert chat_template("auto", list(folders.values())) is None
    for name, text in (("a", "{{ one }}"), ("b", "{{ second }}"), ("c", "{{ second }}")):
        (folders[name] / "chat_template.jinja").write_text(text)
    assert chat_template("auto", list(folders.values())) == "{{ second }}"
    assert chat_template("{{ mine }}", list(folders.values())) == "{{ mine }}"
    with pytest.raises(UserError, match="neither 'auto' nor a template"):
        chat_template("chatml", list(folders.values()))


# --- whole merges ---


def model(folder: Path, seed: int, added: tuple[str, ...] = (), rows: int = 0) -> Path:
    tokenizer(folder, added)
    count = rows or len(vocabulary(folder).tokens)
    torch.manual_seed(seed)
    base = random_tensors(0, rows=200)
    values = {name: tensor + 0.05 * torch.randn(tensor.shape) for name, tensor in base.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        values[name] = values[name][:count]
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    write_model(folder, values)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    return folder


def merged(output: Path, what: Recipe) -> Any:
    merge_recipe(what, output)
    return tensors_of(output)


def test_a_merge_with_union_has_the_rows_of_both_experts(tmp_path: Path) -> None:
    models = {"a": model(tmp_path / "a", 1, ("<law>",)), "b": model(tmp_path / "b", 2, ("<med>",))}
    with pytest.raises(UserError, match="the tokenizers of 'a'"):
        merged(tmp_path / "no", recipe("linear", models))
    output = merged(tmp_path / "out", recipe("linear", models, tokenizer="union"))
    first, second = tensors_of(models["a"]), tensors_of(models["b"])
    size = len(vocabulary(models["a"]).tokens) - 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert output[name].shape[0] == size + 2
        torch.testing.assert_close(output[name][:size], (first[name][:size] + second[name][:size]) / 2)
        assert torch.equal(output[name][size], first[name][size])
        assert torch.equal(output[name][size + 1], second[name][size])
    assert read_json(tmp_path / "out" / "config.json")["vocab_size"] == size + 2


def test_rows_that_several_models_add_are_weighted_like_all_others(tmp_path: Path) -> None:
    models = {name: model(tmp_path / name, number, ("<law>",)) for number, name in enumerate("ab", start=1)}
    seed = model(tmp_path / "seed", 3)
    what = recipe("linear", {"seed": seed, **models}, seed="seed", weights={"a": 0.9, "b": 0.1}, tokenizer="union")
    output = merged(tmp_path / "out", what)
    first, second = (tensors_of(folder)["lm_head.weight"][-1] for folder in models.values())
    torch.testing.assert_close(output["lm_head.weight"][-1], 0.9 * first + 0.1 * second)


def test_a_method_on_task_vectors_gives_added_tokens_their_rows_too(tmp_path: Path) -> None:
    models = {
        name: model(tmp_path / name, number, added)
        for number, (name, added) in enumerate((("seed", ()), ("a", ("<law>",)), ("b", ())))
    }
    output = merged(tmp_path / "out", recipe("ties", models, seed="seed", tokenizer="union"))
    own = tensors_of(models["a"])["lm_head.weight"]
    assert torch.equal(output["lm_head.weight"][-1], own[-1])


def test_padded_vocabularies_stay_padded(tmp_path: Path) -> None:
    models = {"a": model(tmp_path / "a", 1, rows=64), "b": model(tmp_path / "b", 2, ("<med>",), rows=64)}
    output = merged(tmp_path / "out", recipe("linear", models, tokenizer="union"))
    assert output["lm_head.weight"].shape[0] == 64
    assert read_json(tmp_path / "out" / "config.json")["vocab_size"] == 64
