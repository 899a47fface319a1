"""Tokenising as corpora need it: nothing read out of the text, nothing cut off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from tokenizers.decoders import Fuse
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import NFD, Lowercase, Replace, Sequence, StripAccents
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import ByteLevel, TemplateProcessing

from expertctl.core.errors import UserError
from expertctl.core.text.tokenizer import TextEncoder, load_tokenizer, set_begin, train_tokenizer


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> TextEncoder:
    return TextEncoder.of_folder(model_folder)


def copied(model_folder: Path, target: Path, *names: str) -> Path:
    target.mkdir()
    for name in names:
        shutil.copy(model_folder / name, target / name)
    return target


def test_the_name_of_a_special_token_in_a_text_is_only_text(encoder: TextEncoder) -> None:
    (ids,) = encoder.encode(["a<|endoftext|>b"])
    assert encoder.separator not in ids
    assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == "a<|endoftext|>b"


def test_long_texts_are_not_cut_off(model_folder: Path, tmp_path: Path) -> None:
    folder = copied(model_folder, tmp_path / "x", "tokenizer.json", "tokenizer_config.json")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    lengths = [len(ids) for ids in TextEncoder.of_folder(folder).encode(["xyz" * 500, "x"])]
    assert lengths[0] > 100
    assert lengths[1] == 1


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=4))
@settings(max_examples=50, deadline=None)
def test_bytes_are_neither_lost_nor_added(encoder: TextEncoder, texts: list[str]) -> None:
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert all(0 <= token < encoder.vocabulary for token in ids)


def test_it_agrees_with_what_transformers_loads(model_folder: Path, encoder: TextEncoder) -> None:
    theirs = load_tokenizer(model_folder)
    assert encoder.encode(["def area(width):"])[0] == theirs("def area(width):", add_special_tokens=False)["input_ids"]
    assert theirs.eos_token_id == encoder.separator
    assert len(theirs) == encoder.vocabulary


def test_training_a_tokenizer_gives_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train_tokenizer(iter(["to be or not to be"] * 9), 270, tmp_path / name, max_length=64)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert TextEncoder.of_folder(tmp_path / "a").vocabulary <= 270


# --- which token ends a document ---


def test_the_end_token_may_be_an_object_or_only_a_number(model_folder: Path, tmp_path: Path) -> None:
    folder = copied(model_folder, tmp_path / "x", "tokenizer.json", "config.json")
    assert TextEncoder.of_folder(folder).separator == 0
    (folder / "config.json").write_text('{"eos_token_id": [7, 8]}')
    assert TextEncoder.of_folder(folder).separator == 7
    settings_file = folder / "tokenizer_config.json"
    settings_file.write_text('{"eos_token": {"content": "a"}}')
    assert TextEncoder.of_folder(folder).separator == TextEncoder.of_folder(folder).tokenizer.token_to_id("a")
    settings_file.write_text('{"eos_token": "not in it", "bos_token": "b"}')
    (folder / "config.json").unlink()
    assert TextEncoder.of_folder(folder).separator == TextEncoder.of_folder(folder).tokenizer.token_to_id("b")


def test_a_tokenizer_without_an_end_token_is_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = copied(model_folder, tmp_path / "x", "tokenizer.json")
    with pytest.raises(UserError, match="has no end-of-sequence token; add eos_token to tokenizer_config"):
        TextEncoder.of_folder(folder)


def test_a_damaged_tokenizer_is_named(model_folder: Path, tmp_path: Path) -> None:
    folder = copied(model_folder, tmp_path / "x", "tokenizer.json", "tokenizer_config.json")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:-40])
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        TextEncoder.of_folder(folder)


def test_a_folder_without_a_tokenizer_is_named(model_folder: Path, tmp_path: Path) -> None:
    folder = copied(model_folder, tmp_path / "x", "config.json")
    with pytest.raises(UserError, match=r"has no loadable tokenizer .*add its tokenizer\.json"):
        TextEncoder.of_folder(folder)


# --- the token before a text ---

BOS = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
BOTH = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
EOS = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])


def word_tokenizer(folder: Path, processor: object = None, **settings: object) -> Path:
    """Write a tokenizer of a few words, with its own BOS and EOS tokens."""
    words = ["<unk>", "<s>", "</s>", "a", "b", "c"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.decoder = None
    tokenizer.add_special_tokens(words[:3])
    if processor is not None:
        tokenizer.post_processor = processor
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("processor", "begin"),
    [(None, ()), (BOS, (1,)), (BOTH, (1,)), (EOS, ()), (processors.Sequence([ByteLevel(), BOS]), (1,))],
    ids=["none", "bos", "bos and eos", "eos", "sequence"],
)
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
def test_documents_begin_as_the_tokenizer_begins_texts(
    tmp_path: Path, processor: object, begin: tuple[int, ...], settings: dict[str, object]
) -> None:
    folder = word_tokenizer(tmp_path, processor, **settings)
    assert TextEncoder.of_folder(folder).begin == begin
    called = load_tokenizer(folder)("a b").input_ids
    assert tuple(called[: called.index(3)]) == begin


def test_a_token_before_a_text_that_is_the_separator_is_not_doubled(tmp_path: Path) -> None:
    folder = word_tokenizer(tmp_path, TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)]))
    assert TextEncoder.of_folder(folder).begin == ()


@pytest.mark.parametrize("processor", [None, BOS, BOTH, ByteLevel()], ids=["none", "bos", "both", "byte level"])
@pytest.mark.parametrize("begins", [True, False])
def test_the_bos_token_can_be_set_for_everyone_who_reads_the_folder(
    tmp_path: Path, processor: object, begins: bool
) -> None:
    folder = word_tokenizer(tmp_path, processor)
    set_begin(folder, begins=begins)
    assert TextEncoder.of_folder(folder).begin == ((1,) if begins else ())
    assert load_tokenizer(folder)("a b").input_ids[: 1 + begins] == ([1, 3] if begins else [3])


def test_a_tokenizer_without_a_bos_token_cannot_begin_with_it(tmp_path: Path) -> None:
    folder = word_tokenizer(tmp_path, bos_token=None)
    with pytest.raises(UserError, match="has no BOS token; leave bos out"):
        set_begin(folder, begins=True)


# --- text that a tokenizer loses ---


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "é", "中文", "x"]), max_size=12))
def test_unknown_words_are_lost_bytes(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    folder = word_tokenizer(tmp_path_factory.mktemp("words"))
    encoder = TextEncoder.of_folder(folder)
    (document,) = encoder.encode_stream([" ".join(words)], measure_loss=True)
    assert document.lost_bytes == sum(len(word.encode()) for word in words if word not in "abc")


@pytest.mark.parametrize(
    ("normalizer", "text", "lost"),
    [(Lowercase(), "a B C", 2), (Sequence([NFD(), StripAccents()]), "á b", 2), (Replace(" ", ""), "a b", 1)],
    ids=["case", "accents", "spaces"],
)
def test_characters_that_a_tokenizer_changes_are_lost_bytes(
    tmp_path: Path, normalizer: object, text: str, lost: int
) -> None:
    tokenizer = Tokenizer(BPE({character: number for number, character in enumerate("abc ")}, []))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = Fuse()
    encoder = TextEncoder(tokenizer, 0)
    assert encoder.lost_bytes([text], encoder.encode([text])) == [lost]


def test_a_byte_level_tokenizer_loses_nothing(encoder: TextEncoder) -> None:
    texts = ["plain", "  two  spaces\n\n", "Grüße, 世界!", "\x00 <|endoftext|>"]
    assert [document.lost_bytes for document in encoder.encode_stream(texts, measure_loss=True)] == [0] * 4
