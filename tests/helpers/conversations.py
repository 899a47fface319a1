"""Conversations, chat templates of three formats, and a tiny model whose tokenizer knows their special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from expertctl import Workspace
from expertctl.core.text.tokenizer import train_tokenizer

FORMATS = ("chatml", "llama3", "mistral")
TEMPLATES = {
    name: (Path(__file__).parents[1] / "data/chat_templates" / f"{name}.jinja").read_text() for name in FORMATS
}
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXT = "Whether it rains today or not, the law says: return the key. Wozu das? Straße, façade, 東京! 1 + 1 = 2\n\n"


def untagged(template: str) -> str:
    """Return a template without tags around the assistant's turns, as most models have theirs."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "{%- if true %}{%- endif %}", template)


def talk(*texts: str, system: str | None = None) -> dict[str, Any]:
    """Return a record of turns of the user and the assistant."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return {"messages": messages}


TALKS = [
    talk("Whether it rains?", "The law says: not today."),
    talk("1 + 1?", "2", "Straße?", "façade, 東京!\nreturn the key", system="the law"),
    talk("", "", "key", " the key ", system="Be brief."),
    talk("Wozu das?", "return the key. " * 12, "and?", "2"),
]


def write_records(path: Path, records: Iterable[object]) -> str:
    """Write records as JSON lines; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def chat_model(folder: Path, template: str | None = TEMPLATES["chatml"], positions: int = 512) -> Path:
    """Write a tiny random Llama whose tokenizer has the special tokens of all formats and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer([TEXT] * 4, 320, folder, max_length=positions)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS, "bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def reference(folder: Path, messages: Sequence[Any], template: str) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation and which the assistant says, by transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer.apply_chat_template(
        list(messages), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded["input_ids"], encoded["assistant_masks"]


RECORDS = [talk(f"what is {number}?", f"it is {number}. " * (number % 4 + 1), "sure?", "yes") for number in range(60)]
TRAINING = {"tokens": 6_144, "sequence_length": 128, "batch_size": 4, "learning_rate": 3e-3, "validation_blocks": 4}


def make_chat_project(
    root: Path,
    domain: dict[str, Any],
    training: dict[str, Any] | None = None,
    domains: dict[str, Any] | None = None,
) -> Workspace:
    """Return a workspace with the domain `talks` of conversations, and a seed with a chat template."""
    write_records(root / "talks.jsonl", RECORDS)
    content = {
        "seed": {"from": str(chat_model(root / "model"))},
        "training": TRAINING | (training or {}),
        "domains": {"talks": {"path": "talks.jsonl", "format": "chat", **domain}, **(domains or {})},
    }
    (root / "expertctl.yaml").write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    workspace = Workspace(root)
    workspace.seed()
    return workspace
