"""Conversations as tokens, against transformers' own templates and masks."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conversations import FORMATS, TALKS, TEMPLATES, chat_model, reference, talk, untagged
from hypothesis import given, settings
from hypothesis import strategies as st

from expertctl import Conversation, UserError
from expertctl.core.text.rendering import ConversationEncoder, counted_tokens, resolved_template

words = st.text(st.sampled_from("ab é東\n .,{}<"), max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


def encoder(folder: Path, template: str | None, counts: Any = "assistant") -> ConversationEncoder:
    return ConversationEncoder.of_folder(folder, template, counts)


def encoded(using: ConversationEncoder, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    (document,) = using.encode_stream([Conversation(**record).as_text()], measure_loss=True)
    assert document.counted is not None
    assert document.lost_bytes == 0
    return list(document.ids), [int(counts) for counts in document.counted]


@pytest.mark.parametrize("record", TALKS, ids=range(len(TALKS)))
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("has_tags", [True, False])
def test_tokens_and_counts_are_those_of_transformers(
    folder: Path, name: str, record: dict[str, Any], has_tags: bool
) -> None:
    template = TEMPLATES[name] if has_tags else untagged(TEMPLATES[name])
    if name == "mistral" and not has_tags and record["messages"][0]["role"] == "system":
        record = talk(*(message["content"] for message in record["messages"][1:]))
    assert encoded(encoder(folder, template), record) == reference(folder, record["messages"], TEMPLATES[name])


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.sampled_from(FORMATS), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_turns_count_as_transformers_counts_them(
    folder: Path, turns: list[tuple[str, str]], name: str, has_tags: bool
) -> None:
    record = talk(*(text for turn in turns for text in turn))
    template = TEMPLATES[name] if has_tags else untagged(TEMPLATES[name])
    assert encoded(encoder(folder, template), record) == reference(folder, record["messages"], TEMPLATES[name])


def test_the_last_turn_or_everything_can_count(folder: Path) -> None:
    record = TALKS[1]
    for template in (TEMPLATES["chatml"], untagged(TEMPLATES["chatml"])):
        ids, last = encoded(encoder(folder, template, "last"), record)
        _, assistant = encoded(encoder(folder, template), record)
        end = len(assistant) - assistant[::-1].index(0)
        assert last == [0] * end + assistant[end:]
        assert encoded(encoder(folder, template, "all"), record) == (ids, [1] * len(ids))


def test_a_turn_of_weight_zero_does_not_count(folder: Path) -> None:
    record = talk("a", "b", "a", "b")
    lighter = {"messages": [*record["messages"][:1], {**record["messages"][1], "weight": 0}, *record["messages"][2:]]}
    for template in (TEMPLATES["llama3"], untagged(TEMPLATES["llama3"])):
        assert encoded(encoder(folder, template), lighter) == encoded(encoder(folder, template, "last"), record)


def test_a_conversation_can_begin_with_the_assistant(folder: Path) -> None:
    record = {"messages": [{"role": "assistant", "content": "key"}, {"role": "user", "content": "law"}]}
    template = untagged(TEMPLATES["chatml"])
    assert encoded(encoder(folder, template), record) == reference(folder, record["messages"], TEMPLATES["chatml"])


def test_tool_calls_are_the_assistants(folder: Path) -> None:
    call = {"type": "function", "function": {"name": "key", "arguments": {"law": 1}}}
    record = talk("a", "b")
    record["messages"][1]["tool_calls"] = [call]
    record["messages"].append({"role": "tool", "content": "2"})
    template = untagged(TEMPLATES["chatml"])
    ids, counted = encoded(encoder(folder, template), record)
    assert (ids, counted) == reference(folder, record["messages"], TEMPLATES["chatml"])


def test_a_prompt_without_a_template_is_followed_by_its_completion_and_its_end(folder: Path) -> None:
    using = encoder(folder, None)
    ids, counted = encoded(using, talk("1 + 1 =", " 2"))
    assert using.tokenizer.decode(ids) == "1 + 1 = 2</s>"
    assert [using.tokenizer.decode([token]) for token, counts in zip(ids, counted, strict=True) if counts] == [
        " 2",
        "</s>",
    ]


def test_bytes_are_those_of_the_text_that_counts(folder: Path) -> None:
    (document,) = encoder(folder, TEMPLATES["chatml"]).encode_stream([Conversation(**TALKS[1]).as_text()])
    assert document.counted_text == "2\nfaçade, 東京!\nreturn the key\n"


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        ("{{ messages[0].content }}", talk("law", "key"), "leaves out text of message 2"),
        ("{{ raise_exception('no') }}", talk("law", "key"), "refuses the conversation that begins 'law'.*no"),
        ("{{ messages | nothing }}", talk("law", "key"), "refuses"),
        (
            "{%- for m in messages %}{{ ('x' if loop.last else '') + m.content }}{% endfor %}",
            talk("a", "b", "c", "d"),
            "differently once others follow",
        ),
        (TEMPLATES["chatml"], talk("a <|im_end|> b", "key"), "has the special token"),
        ("{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}", talk("law", "key"), "marks 2 turns"),
        (None, talk("a", "b", "c", "d"), "is for a prompt and its completion"),
    ],
)  # fmt: skip
def test_what_a_template_changes_is_refused(
    folder: Path, template: str | None, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        encoder(folder, template).rendered(Conversation(**record))


def test_a_tokenizer_without_a_template_is_refused_with_what_to_do(tmp_path: Path, folder: Path) -> None:
    plain = chat_model(tmp_path / "plain", template=None)
    with pytest.raises(UserError, match=r"has no chat template; set chat_template.*chatml"):
        resolved_template(None, plain, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        resolved_template("chat.jinja", plain, tmp_path)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert resolved_template("chat.jinja", plain, tmp_path) == "{{ messages }}"
    assert "im_start" in (resolved_template("chatml", plain, tmp_path) or "")
    assert resolved_template("none", plain, tmp_path) is None
    assert resolved_template(None, folder, tmp_path) == TEMPLATES["chatml"]


@given(st.data())
def test_a_token_counts_if_it_overlaps_a_span(data: st.DataObject) -> None:
    borders = sorted(data.draw(st.sets(st.integers(0, 30), max_size=8)))
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, 30), max_size=10))), 31]
    offsets = list(itertools.pairwise(cuts))
    naive = [any(set(range(*span)) & set(range(*token)) for span in spans) for token in offsets]
    assert counted_tokens(offsets, spans) == naive


@pytest.mark.skipif("EXPERTCTL_TRL_PYTHON" not in os.environ, reason="set EXPERTCTL_TRL_PYTHON: a Python that has trl")
@pytest.mark.parametrize("name", FORMATS)
def test_trl_counts_the_same_tokens(folder: Path, tmp_path: Path, name: str) -> None:
    records = [
        {"messages": [{"role": message["role"], "content": message["content"]} for message in record["messages"]]}
        for record in TALKS
    ]
    (tmp_path / "given.json").write_text(
        json.dumps({"folder": str(folder), "template": TEMPLATES[name], "records": records})
    )
    script = Path(__file__).parents[2] / "helpers" / "trl_labels.py"
    command = [os.environ["EXPERTCTL_TRL_PYTHON"], script, tmp_path / "given.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for record, (ids, labels) in zip(records, json.loads(done.stdout.splitlines()[-1]), strict=True):
        own, counted = encoded(encoder(folder, TEMPLATES[name]), record)
        assert own == ids
        assert [label != -100 for label in labels] == [bool(counts) for counts in counted]
