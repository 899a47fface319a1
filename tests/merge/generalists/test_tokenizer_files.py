"""Tokenizer files of merged models, and whole merges of models with different tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import recipe, tensors_of
from toy_tokenizers import model, tokenizer, tokens_of, update, vocabulary

from expertctl.core.artefacts.files import read_json
from expertctl.core.errors import UserError
from expertctl.merge.generalists.tokenizer_files import write_tokenizer
from expertctl.merge.merging import merge_recipe, plan_recipe
from expertctl.merge.recipes.recipe import Recipe, TokenSource
from expertctl.merge.sources.vocabularies.planning import plan_vocabulary


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


# --- whole merges ---


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


def test_a_new_token_in_padding_has_the_row_of_the_model_that_has_it(tmp_path: Path) -> None:
    """Padding rows of the base, which belong to no token, are not merged into it."""
    models = {"a": model(tmp_path / "a", 1, rows=64), "b": model(tmp_path / "b", 2, ("<med>",), rows=64)}
    output = merged(tmp_path / "out", recipe("linear", models, tokenizer="union"))
    row = tokens_of(tmp_path / "out")["<med>"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(output[name][row], tensors_of(models["b"])[name][row])


# --- declared tokens without embedding rows ---

UNUSED = tuple(f"<UNUSED_{number}>" for number in range(4))


@pytest.mark.parametrize("policy", ["union", "base", "padded"])
def test_declared_tokens_without_rows_are_left_out(tmp_path: Path, policy: str) -> None:
    """Whether the base declares them or another model: ids and rows are those of models that do not declare them."""
    plain = model(tmp_path / "plain", 1)
    size = vocabulary(plain).rows
    models = {"padded": model(tmp_path / "padded", 2, UNUSED, rows=size), "plain": plain}
    for order in (("padded", "plain"), ("plain", "padded")):
        output = tmp_path / order[0]
        what = recipe("linear", {name: models[name] for name in order}, tokenizer=policy)
        tensors = merged(output / "out", what)
        assert tensors["model.embed_tokens.weight"].shape[0] == size
        assert tokens_of(output / "out") == tokens_of(plain)
        assert any("'<UNUSED_0>', '<UNUSED_1>', '<UNUSED_2>' ..." in note for note in plan_recipe(what, None).notes)


def test_a_new_token_takes_the_next_id_after_the_rows(tmp_path: Path) -> None:
    size = vocabulary(tokenizer(tmp_path / "size")).rows
    models = {
        "base": model(tmp_path / "base", 1, UNUSED, rows=size),
        "chat": model(tmp_path / "chat", 2, ("<|im_start|>", "<|im_end|>")),
    }
    output = merged(tmp_path / "out", recipe("linear", models, tokenizer="union"))
    tokens = tokens_of(tmp_path / "out")
    assert {token: tokens[token] for token in tokens_of(tmp_path / "size")} == tokens_of(tmp_path / "size")
    assert (tokens["<|im_start|>"], tokens["<|im_end|>"]) == (size, size + 1)
    assert len(tokens) == size + 2
    own = tensors_of(models["chat"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert output[name].shape[0] == size + 2
        assert torch.equal(output[name][size:], own[name][size:])


def test_settings_that_name_a_token_without_row_go_with_it(tmp_path: Path) -> None:
    """A pad token beyond the rows, as of several published models: loading must not add it again."""
    size = vocabulary(tokenizer(tmp_path / "size")).rows
    base = model(tmp_path / "base", 1, ("<pad>",), rows=size)
    entry = {"content": "<pad>", "special": True}
    update(base / "tokenizer_config.json", pad_token="<pad>", added_tokens_decoder={str(size): entry})
    update(base / "special_tokens_map.json", pad_token=entry, additional_special_tokens=["<pad>", "<unk>"])
    update(base / "added_tokens.json", **{"<pad>": size})
    update(base / "config.json", pad_token_id=size, eos_token_id=[0, size])
    update(base / "generation_config.json", pad_token_id=size, eos_token_id=0)
    other = model(tmp_path / "other", 2, ("<law>",))
    merged(tmp_path / "out", recipe("linear", {"base": base, "other": other}, tokenizer="union"))
    assert tokens_of(tmp_path / "out")["<law>"] == size
    assert "<pad>" not in tokens_of(tmp_path / "out")
    settings = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert "pad_token" not in settings
    assert list(settings["added_tokens_decoder"]) == [str(size)]
    assert settings["added_tokens_decoder"][str(size)]["content"] == "<law>"
    assert read_json(tmp_path / "out" / "special_tokens_map.json") == {"additional_special_tokens": ["<unk>"]}
    assert read_json(tmp_path / "out" / "added_tokens.json") == {"<law>": size}
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["pad_token_id"], config["eos_token_id"]) == (None, [0])
    assert read_json(tmp_path / "out" / "generation_config.json") == {"pad_token_id": None, "eos_token_id": 0}


def test_tokens_of_the_tokenisation_model_without_rows_leave_with_their_merges(tmp_path: Path) -> None:
    whole = tokenizer(tmp_path / "whole")
    tokens = vocabulary(whole).tokens
    kept = len(tokens) - 3
    last = [token for token, number in tokens.items() if number >= kept]
    models = {"a": model(tmp_path / "a", 1, rows=kept), "b": model(tmp_path / "b", 2, ("<law>",), rows=kept)}
    (models["a"] / "vocab.json").write_text(json.dumps(tokens))
    output = merged(tmp_path / "out", recipe("linear", models, tokenizer="base"))
    assert output["lm_head.weight"].shape[0] == kept
    assert tokens_of(tmp_path / "out") == {token: number for token, number in tokens.items() if token not in last}
    content = read_json(tmp_path / "out" / "tokenizer.json")
    assert not any("".join(merge) in last for merge in content["model"]["merges"])
    assert not (tmp_path / "out" / "vocab.json").exists()


def test_a_tokenizer_that_inserts_a_token_without_row_is_refused(tmp_path: Path) -> None:
    size = vocabulary(tokenizer(tmp_path / "size")).rows
    base, other = model(tmp_path / "base", 1, ("<bos>",), rows=size), model(tmp_path / "other", 2, ("<law>",))
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [size], "tokens": ["<bos>"]}},
    }
    for processor in (template, {"type": "Sequence", "processors": [template]}):
        update(base / "tokenizer.json", post_processor=processor)
        with pytest.raises(UserError, match="needs the token '<bos>', which has no embedding row") as caught:
            plan_recipe(recipe("linear", {"base": base, "other": other}, tokenizer="union"), None)
        assert "\n" not in str(caught.value)


# --- sources of single tokens ---


def test_a_token_may_take_the_row_of_another_token_or_zeros(tmp_path: Path) -> None:
    models = {"a": model(tmp_path / "a", 1), "b": model(tmp_path / "b", 2, ("<law>",))}
    size = vocabulary(models["a"]).rows
    sources = {
        "the": TokenSource("b", force=True, token=size),
        "of": TokenSource("a", force=True, token="a"),
        "be": TokenSource(None, force=True),
        "<new>": TokenSource("b", token="the"),
        "<empty>": TokenSource(None),
    }
    output = merged(tmp_path / "out", recipe("linear", models, tokenizer="base", tokens=sources))
    first, second = (tensors_of(models[name])["lm_head.weight"] for name in "ab")
    own = vocabulary(models["a"]).tokens
    head, tokens = output["lm_head.weight"], tokens_of(tmp_path / "out")
    assert torch.equal(head[own["the"]], second[size])
    assert torch.equal(head[own["of"]], first[own["a"]])
    assert not head[own["be"]].any()
    assert (tokens["<new>"], tokens["<empty>"]) == (size, size + 1)
    assert torch.equal(head[size], second[own["the"]])
    assert not head[size + 1].any()
    assert head.shape[0] == size + 2


def test_a_new_token_with_a_source_keeps_the_entry_of_that_model(tmp_path: Path) -> None:
    models = {"a": model(tmp_path / "a", 1), "b": model(tmp_path / "b", 2, ("<law>", "<med>"))}
    content = read_json(models["b"] / "tokenizer.json")
    content["added_tokens"][-1]["special"] = True
    (models["b"] / "tokenizer.json").write_text(json.dumps(content))
    output = merged(tmp_path / "out", recipe("linear", models, tokenizer="base", tokens={"<med>": TokenSource("b")}))
    size = vocabulary(models["a"]).rows
    assert torch.equal(output["lm_head.weight"][size], tensors_of(models["b"])["lm_head.weight"][size + 1])
    entry = read_json(tmp_path / "out" / "tokenizer.json")["added_tokens"][-1]
    assert (entry["content"], entry["id"], entry["special"]) == ("<med>", size, True)
    assert "<law>" not in tokens_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TokenSource("b"), "'b' has no token 'teh' (did you mean 'the'?)"),
        (TokenSource("b", token="lnad"), "'b' has no token 'lnad' (did you mean 'land'?)"),
        (TokenSource("b", token=1000), "'b' has no token id 1000; it has "),
    ],
)
def test_a_source_without_the_token_is_refused_without_listing_the_vocabulary(
    tmp_path: Path, source: TokenSource, message: str
) -> None:
    models = {"a": model(tmp_path / "a", 1), "b": model(tmp_path / "b", 2)}
    with pytest.raises(UserError) as caught:
        plan_recipe(recipe("linear", models, tokenizer="base", tokens={"teh": source}), None)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 100
