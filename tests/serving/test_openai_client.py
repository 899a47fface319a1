"""OpenAI's own client on a server."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import RunningServer

from expertctl.serving.models import Way

PROMPT = "def area(width"


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["ensemble", "mixture"]
    model: Any = client.models.retrieve("ensemble")
    assert (model.experts, model.shares, model.chat) == (["code", "law", "news"], True, True)
    with pytest.raises(openai.NotFoundError, match=r"did you mean 'mixture'\?"):
        client.models.retrieve("mixtur")


@pytest.mark.parametrize("model", ["ensemble", "mixture"])
def test_a_streamed_completion_has_the_text_of_a_whole_one(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 12, "seed": 3, "logprobs": 2}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(part.text for part in parts) == whole.choices[0].text
    assert parts[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    logprobs: Any = whole.choices[0].logprobs
    assert logprobs.token_logprobs == [value for part in parts for value in part.logprobs.token_logprobs]
    assert logprobs.text_offset == [value for part in parts for value in part.logprobs.text_offset]
    assert client.completions.create(**asked).choices[0].text == whole.choices[0].text


def test_n_texts_of_several_prompts(client: openai.OpenAI) -> None:
    got = client.completions.create(model="mixture", prompt=[PROMPT, "The quick"], n=2, max_tokens=8, seed=5)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in got.choices}) == 4
    alone = client.completions.create(model="mixture", prompt="The quick", max_tokens=8, seed=7)
    assert alone.choices[0].text == got.choices[2].text  # seeds count up


def test_chats_are_rendered_by_the_template(client: openai.OpenAI, server: RunningServer) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
    got = client.chat.completions.create(model="mixture", **asked, logprobs=True, top_logprobs=2)
    rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    raw = client.completions.create(model="mixture", prompt=rendered, max_tokens=6, temperature=0)
    assert got.choices[0].message.content == raw.choices[0].text
    assert got.choices[0].message.role == "assistant"
    content = (got.choices[0].logprobs or pytest.fail("no logprobs")).content or []
    assert len(content) == 6
    assert all(len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob for token in content)
    parts = [chunk.choices[0].delta for chunk in client.chat.completions.create(model="mixture", **asked, stream=True)]
    assert parts[0].role == "assistant"
    assert "".join(part.content or "" for part in parts) == got.choices[0].message.content


def test_tools_and_parts_reach_the_template(client: openai.OpenAI, server: RunningServer, monkeypatch: Any) -> None:
    model = server.models["mixture"]
    template = "{{ tools | tojson if tools else 'none' }}|{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.a }}{% endif %};{% endfor %}"
    monkeypatch.setattr(model, "_template", template)
    seen = []
    checked = model._checked
    monkeypatch.setattr(model, "_checked", lambda ids: seen.append(model._tokenizer.decode(ids)) or checked(ids))
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "seven"}'}}
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    for choice in ("auto", "none"):
        client.chat.completions.create(
            model="mixture",
            messages=messages,
            tools=[tool],
            tool_choice=choice,
            max_tokens=1,  # type: ignore[list-item,call-overload]
        )
    assert seen[0].endswith("|user:xy;assistant:seven;")
    assert '"name": "f"' in seen[0]
    assert seen[1] == "none|user:xy;assistant:seven;"


@pytest.mark.filterwarnings("ignore:everything outside the feed-forward networks")
def test_shares_and_disabled_experts(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "ensemble", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    choice: Any = client.completions.create(**asked, extra_body={"shares": True}).choices[0]
    for entry in choice.expert_shares:
        assert list(entry["shares"]) == ["code", "law", "news"]
        assert sum(entry["shares"].values()) == pytest.approx(1, abs=1e-5)
    assert "".join(entry["token"] for entry in choice.expert_shares) == choice.text
    alone: Any = client.completions.create(**asked, extra_body={"shares": True, "without": ["law", "news"]}).choices[0]
    assert all(entry["shares"] == {"code": 1.0} for entry in alone.expert_shares)
    mixture = {**asked, "model": "mixture", "max_tokens": 30}
    plain, without = (
        client.completions.create(**mixture, extra_body=extra).choices[0].text for extra in ({}, {"without": ["code"]})
    )
    assert plain != without


def test_twenty_clients_at_once_get_their_own_texts(client: openai.OpenAI) -> None:
    def ask(number: int, stream: bool) -> str:
        asked: dict[str, Any] = {
            "model": "mixture",
            "prompt": PROMPT[: 3 + number % 9],
            "seed": number,
            "max_tokens": 20,
        }
        if not stream:
            return client.completions.create(**asked).choices[0].text
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))

    alone = [ask(number, False) for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, range(20), [number % 2 == 0 for number in range(20)]))
    assert together == alone


def test_a_stop_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "mixture", "prompt": PROMPT, "max_tokens": 30, "seed": 2}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:13]
    choice = client.completions.create(**asked, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.find(stop)], "stop")


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_hangs_up_frees_its_place(server: RunningServer, streams: bool) -> None:
    engine = server.models["ensemble"]._variants[Way(plain=True)]
    begun = threading.Event()
    step = engine._batch.step

    def slow_step(*arguments: Any, **named: Any) -> Any:
        begun.set()
        time.sleep(0.05)
        return step(*arguments, **named)

    engine._batch.step = slow_step  # type: ignore[method-assign]
    try:
        fields = {"model": "ensemble", "prompt": "x", "max_tokens": 100, "stream": streams, "ignore_eos": True}
        body = json.dumps(fields)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall((head + body).encode())
            assert begun.wait(10)
        server.wait_until_idle("ensemble", 3)  # all tokens would take five seconds
    finally:
        engine._batch.step = step  # type: ignore[method-assign]
