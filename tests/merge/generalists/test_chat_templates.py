"""Chat templates of merged models: chosen, named, and rendered as their formats are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_models import recipe
from toy_tokenizers import model, tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from expertctl.core.errors import UserError
from expertctl.core.text.chat_templates import NAMED_TEMPLATES, template_of
from expertctl.merge.generalists.chat_templates import chat_template
from expertctl.merge.merging import merge_recipe

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye",
        "\n\n### Response:\n",
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n",
        "[|assistant|]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s> [INST] Be brief.\n\nHi [/INST] Hello</s> [INST] Bye [/INST]", ""),
}


def rendered(template: str, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )
    return texts[0]


@pytest.mark.parametrize("name", sorted(NAMED_TEMPLATES))
def test_a_named_template_renders_its_format(name: str) -> None:
    template = chat_template(name, [])
    assert template is not None
    text, prompt = RENDERED[name]
    assert rendered(template, TALK) == text
    assert rendered(template, TALK, prompt=True) == text + prompt


@pytest.mark.parametrize("name", sorted(NAMED_TEMPLATES))
def test_a_talk_without_system_message_renders_too(name: str) -> None:
    text = rendered(NAMED_TEMPLATES[name], TALK[1:2], prompt=True)
    assert "Hi" in text
    assert "Be brief." not in text
    assert text.startswith("[|system|][|endofturn|]\n") == (name == "exaone")


def test_mistrals_format_needs_alternating_roles() -> None:
    with pytest.raises(Exception, match="alternate between user and assistant"):
        rendered(NAMED_TEMPLATES["mistral"], [TALK[1], TALK[3]])


def test_a_chat_template_is_the_most_common_or_the_given_text(tmp_path: Path) -> None:
    folders = {name: tokenizer(tmp_path / name) for name in "abc"}
    assert chat_template("auto", list(folders.values())) is None
    for name, text in (("a", "{{ one }}"), ("b", "{{ second }}"), ("c", "{{ second }}")):
        (folders[name] / "chat_template.jinja").write_text(text)
    assert chat_template("auto", list(folders.values())) == "{{ second }}"
    assert chat_template("{{ mine }}", list(folders.values())) == "{{ mine }}"
    with pytest.raises(
        UserError, match=r"no chat_template 'chatlm' \(did you mean 'chatml'\?\); there are: alpaca, auto"
    ):
        chat_template("chatlm", list(folders.values()))


@pytest.mark.parametrize(
    "stored", ["{{ mine }}", {"default": "{{ mine }}"}, [{"name": "default", "template": "{{ mine }}"}]]
)
def test_a_models_template_is_read_in_every_form(tmp_path: Path, stored: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    assert template_of(tmp_path) == "{{ mine }}"


def test_a_merge_writes_the_named_template(tmp_path: Path) -> None:
    models = {"a": model(tmp_path / "a", 1), "b": model(tmp_path / "b", 2)}
    merge_recipe(recipe("linear", models, chat_template="chatml"), tmp_path / "out")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == "".join(RENDERED["chatml"])
