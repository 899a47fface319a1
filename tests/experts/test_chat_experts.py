"""Experts of conversations, from files to bits per byte."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import RECORDS, TEMPLATES, make_chat_project, reference
from inline_launching import inline_launching
from transformers import AutoModelForCausalLM

from expertctl import UserError, Workspace


def test_an_expert_of_conversations_learns_to_answer(tmp_path: Path) -> None:
    workspace = make_chat_project(tmp_path, {})
    workspace.branch("helper", domain="talks")
    with inline_launching():
        workspace.train("helper")
    table = workspace.evaluate("seed", "helper")
    scores = {name: table.scores[name]["talks"].values["bits_per_byte"] for name in ("seed", "helper")}
    assert scores["helper"] < scores["seed"] - 0.5

    # the figure by transformers alone: bits of the counted text, without special tokens, by its bytes
    (prepared,) = workspace.prepare()
    assert prepared.test is not None
    tested = [record for record in RECORDS if _in_part(workspace, record)]
    assert len(tested) == prepared.test.documents
    model = AutoModelForCausalLM.from_pretrained(workspace.layout.seed, dtype=torch.float64)
    special = set(prepared.test.markers)
    bits = size = 0.0
    for record in tested:
        ids, mask = reference(workspace.layout.seed, record["messages"], TEMPLATES["chatml"])
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [place for place in range(1, len(ids)) if mask[place] and ids[place] not in special]
        bits -= sum(float(logs[place - 1, ids[place]]) for place in places) / math.log(2)
        size += sum(
            len(message["content"].encode()) + 1 for message in record["messages"] if message["role"] == "assistant"
        )
    assert prepared.test.bytes == size
    assert scores["seed"] == pytest.approx(bits / size, rel=1e-5)


def _in_part(workspace: Workspace, record: dict[str, Any], part: str = "test") -> bool:
    from expertctl import Conversation
    from expertctl.experts.text.corpora import domain_documents

    config = workspace.config.domains["talks"]
    return Conversation(**record).as_text() in set(domain_documents(config, workspace.layout.root, part))


def test_what_counts_and_the_template_are_part_of_the_text(tmp_path: Path) -> None:
    digests = set()
    for number, domain in enumerate(
        ({}, {"counts": "all"}, {"chat_template": "llama3"}, {"chat_template": "own.jinja"})
    ):
        root = tmp_path / str(number)
        root.mkdir()
        (root / "own.jinja").write_text(TEMPLATES["llama3"])
        digests.add(make_chat_project(root, domain).prepare()[0].train.digest)
    assert len(digests) == 3, "llama3 by name and from a file are the same"
    (root / "own.jinja").write_text(TEMPLATES["mistral"])
    assert Workspace(root).prepare()[0].train.digest not in digests


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"format": "chats"}, "did you mean 'chat'"),
        ({"chat_template": "none"}, "is for a prompt and its completion"),
        ({"chat_template": "nowhere.jinja"}, "does not exist; give a file"),
        ({"counts": "some"}, "counts"),
        ({"format": None, "counts": "all"}, "set 'format' to chat"),
        ({"format": None, "bundled": "python", "path": None, "chat_template": "chatml"}, "set 'format' to chat"),
        ({"path": "none.jsonl"}, "does not exist"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, domain: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_chat_project(tmp_path, domain).prepare()
    assert "\n" not in str(caught.value)


def test_what_reads_plain_text_refuses_conversations(tmp_path: Path) -> None:
    workspace = make_chat_project(tmp_path, {}, domains={"others": {"path": "talks.jsonl", "format": "chat"}})
    with pytest.raises(UserError, match="discovery reads plain text, and domain 'talks' holds conversations"):
        workspace.discover("groups", 2)
    with pytest.raises(UserError, match="a proxy reads plain text"):
        workspace.data.proxy("near", like="talks", source="others")


def test_stages_of_shorter_blocks_are_for_text(tmp_path: Path) -> None:
    workspace = make_chat_project(tmp_path, {})
    stages = [{"share": 0.5, "sequence_length": workspace.config.training.sequence_length // 2}]
    with pytest.raises(UserError, match=r"training.stages reads plain text, and domain 'talks' holds conversations"):
        workspace.branch("staged", domain="talks", training={"stages": stages, "tokens": 10_000})
