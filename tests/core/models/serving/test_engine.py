"""The engine: texts do not depend on each other, and equal what transformers computes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served_texts import Collector, answers

from expertctl.core.models.loading import load_model
from expertctl.core.models.serving.engine import Engine, QueueFullError, StoppedError
from expertctl.core.models.serving.requests import TextRequest
from expertctl.core.models.serving.text_stream import decoder_of
from expertctl.core.testing import tiny_model_folder

TEXT = "def area(width, height):\n    return width * height\n"


class Served:
    """A model, its tokenizer and its engine."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.model, self.tokenizer = load_model(folder)
        self.engine = Engine(
            self.model,
            decoder_of(self.tokenizer),
            expert_names=getattr(self.model, "expert_names", ()),
            **settings,
        )

    def prompt(self, length: int) -> tuple[int, ...]:
        return tuple(self.tokenizer(TEXT)["input_ids"][:length])

    def close(self) -> None:
        self.engine.stop()
        assert self.engine.join(10)

    def greedy(self, prompt: tuple[int, ...], count: int) -> list[int]:
        """Return what `generate` of transformers continues with."""
        ids = torch.tensor([prompt])
        new: list[int] = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )[0, len(prompt) :].tolist()
        return new


@pytest.fixture(scope="module")
def served(model_folder: Path) -> Iterator[Served]:
    served = Served(model_folder)
    yield served
    served.close()


def many(served: Served, count: int = 20, **settings: Any) -> list[TextRequest]:
    """Return different requests: greedy and sampled, of several lengths."""
    return [
        TextRequest(
            served.prompt(3 + number % 9),
            12 + number % 8,
            temperature=(number % 3) * 0.6,
            top_p=0.9 if number % 4 == 1 else 1.0,
            top_k=40 if number % 5 == 2 else 0,
            seed=number,
            **settings,
        )
        for number in range(count)
    ]


def test_a_text_is_the_same_alone_and_among_nineteen_others(served: Served) -> None:
    assert served.engine.mode == "batched"
    requests = many(served)
    alone = [answers(served.engine, [request])[0] for request in requests]
    together = answers(served.engine, requests, streams=True)
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({tuple(answer.ids) for answer in alone}) > 15


def test_texts_that_join_a_running_batch_are_the_same_as_alone(served: Served) -> None:
    requests = many(served, 9)
    alone = [answers(served.engine, [request])[0].ids for request in requests]
    collectors = [Collector(request, streams=True) for request in requests]
    for collector in collectors:  # each waits for a token of the one before
        served.engine.submit([collector.job])
        collector.wait_for_text()
    assert [collector.answer().ids for collector in collectors] == alone


@pytest.mark.parametrize("family", ["gpt2", "mistral", "bloom", "mixtral"])
def test_greedy_texts_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    served = Served(tiny_model_folder(tmp_path / family, family))
    requests = [TextRequest(served.prompt(3 + number), 15, temperature=0) for number in range(6)]
    got = answers(served.engine, requests)
    assert served.engine.mode == "batched"
    assert [answer.ids for answer in got] == [served.greedy(request.prompt, 15) for request in requests]
    served.close()


def test_a_sliding_window_shorter_than_the_texts(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "mistral", "mistral")
    path = folder / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"sliding_window": 4096', '"sliding_window": 8'))
    served = Served(folder)
    assert served.model.config.sliding_window == 8
    requests = [TextRequest(served.prompt(3 + 3 * number), 20 - 3 * number, temperature=0) for number in range(5)]
    got = answers(served.engine, requests)
    assert [answer.ids for answer in got] == [served.greedy(request.prompt, request.max_tokens) for request in requests]
    served.close()


def test_a_model_that_numbers_positions_itself_is_served_one_text_at_a_time(model_folder: Path) -> None:
    model, tokenizer = load_model(model_folder)
    plain = model.forward

    def forward(input_ids: Any, attention_mask: Any = None, past_key_values: Any = None, use_cache: Any = None) -> Any:
        return plain(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    model.forward = forward  # neither padding nor positions reach it
    engine = Engine(model, decoder_of(tokenizer))
    assert engine.mode == "cached"
    prompts = [tuple(tokenizer(TEXT)["input_ids"][: 3 + number]) for number in range(3)]
    got = answers(engine, [TextRequest(prompt, 5, temperature=0) for prompt in prompts])
    for prompt, answer in zip(prompts, got, strict=True):
        ids = torch.tensor([[*prompt, *answer.ids]])
        assert plain(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == answer.ids
    engine.stop()


def test_a_model_without_a_cache_reads_the_whole_text(model_folder: Path) -> None:
    model, tokenizer = load_model(model_folder)
    plain = model.forward
    model.forward = lambda input_ids, attention_mask=None: plain(input_ids=input_ids, use_cache=False)
    engine = Engine(model, decoder_of(tokenizer))
    assert engine.mode == "uncached"
    prompt = tuple(tokenizer(TEXT)["input_ids"][:5])
    got = answers(engine, [TextRequest(prompt, 6, temperature=0)] * 2)
    ids = torch.tensor([[*prompt, *got[0].ids]])
    assert plain(input_ids=ids).logits[0, 4:-1].argmax(-1).tolist() == got[0].ids == got[1].ids
    engine.stop()


def test_log_probabilities_equal_those_of_a_forward_pass(served: Served) -> None:
    requests = many(served, 6, logprobs=3)
    for request, answer in zip(requests, answers(served.engine, requests), strict=True):
        with torch.no_grad():
            logits = served.model(input_ids=torch.tensor([[*request.prompt, *answer.ids]])).logits[0]
        log_probs = logits[len(request.prompt) - 1 : -1].double().log_softmax(-1)
        for row, token in zip(log_probs, answer.tokens, strict=True):
            assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
            values, ids = row.topk(3)
            assert [number for number, _ in token.alternatives] == ids.tolist()
            assert [value for _, value in token.alternatives] == pytest.approx(values.tolist(), abs=1e-4)


def test_samples_follow_the_distribution(served: Served) -> None:
    prompt = served.prompt(4)
    drawn = answers(served.engine, [TextRequest(prompt, 1, 0.7, seed=seed) for seed in range(250)])
    with torch.no_grad():
        logits = served.model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    probability, token = (logits / 0.7).softmax(-1).max(0)
    share = sum(answer.ids == [int(token)] for answer in drawn) / 250
    spread = math.sqrt(float(probability) * (1 - float(probability)) / 250)
    assert abs(share - float(probability)) < 4 * spread


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}])
def test_truncated_to_one_token_sampling_is_greedy(served: Served, settings: dict[str, Any]) -> None:
    prompt = served.prompt(5)
    request = TextRequest(prompt, 8, 1.5, seed=3, **settings)
    assert answers(served.engine, [request])[0].ids == served.greedy(prompt, 8)


def test_a_stop_text_across_tokens_ends_the_text_before_it(served: Served) -> None:
    plain = answers(served.engine, [TextRequest(served.prompt(6), 30, 0.9, seed=5)])[0]
    middle = len(plain.text) // 2
    stop = plain.text[middle : middle + 4]
    place = plain.text.find(stop)
    request = TextRequest(served.prompt(6), 30, 0.9, seed=5, stop=("not in it", stop))
    for streams in (False, True):
        answer = answers(served.engine, [request], streams=streams)[0]
        assert (answer.text, answer.finish) == (plain.text[:place], "stop")
        assert answer.ids == plain.ids[: len(answer.ids)]
        assert len("".join(token.text for token in answer.tokens)) >= place


def test_text_held_back_for_a_stop_text_is_given_at_the_end(served: Served) -> None:
    plain = answers(served.engine, [TextRequest(served.prompt(6), 10, 0, seed=5)])[0]
    never = plain.text[-2:] + "never comes"
    answer = answers(served.engine, [TextRequest(served.prompt(6), 10, 0, seed=5, stop=(never,))], streams=True)[0]
    assert (answer.text, answer.ids, answer.finish) == (plain.text, plain.ids, "length")


def test_an_end_token_ends_the_text(model_folder: Path, served: Served) -> None:
    ids = answers(served.engine, [TextRequest(served.prompt(6), 10, 0)])[0].ids
    ending = Served(model_folder, end_tokens=[ids[4]])
    first = ids.index(ids[4])
    got, going_on = answers(
        ending.engine, [TextRequest(served.prompt(6), 10, 0), TextRequest(served.prompt(6), 10, 0, ignore_eos=True)]
    )
    assert (got.ids, got.finish) == (ids[:first], "stop")
    assert (going_on.ids, going_on.finish) == (ids, "length")
    ending.close()


def test_a_cancelled_text_leaves_the_batch_and_others_go_on(served: Served) -> None:
    endless = Collector(TextRequest(served.prompt(4), 100, 0), streams=True)
    other = TextRequest(served.prompt(5), 100, 0)
    expected = answers(served.engine, [other])[0].ids
    companion = Collector(other)
    served.engine.submit([endless.job, companion.job])
    endless.wait_for_text()
    endless.job.cancel()
    answer = endless.answer()
    assert (answer.finish, len(answer.ids) < 100) == ("cancelled", True)
    assert companion.answer().ids == expected


def test_a_text_without_time_left_ends_as_it_is(model_folder: Path, served: Served) -> None:
    slow = Served(model_folder)
    step = slow.engine._batch.step

    def slow_step(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.05)
        return step(*arguments, **named)

    slow.engine._batch.step = slow_step  # type: ignore[method-assign]
    collector = Collector(TextRequest(served.prompt(4), 100, 0), seconds=0.4)
    slow.engine.submit([collector.job])
    answer = collector.answer()
    assert answer.finish == "length"
    assert 0 < len(answer.ids) < 100
    late = Collector(TextRequest(served.prompt(4), 5, 0), seconds=-1)
    slow.engine.submit([late.job])
    assert "waited too long" in (late.answer().error or "")
    slow.close()


def test_a_failing_forward_pass_fails_its_texts_only(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = Served(model_folder)
    request = TextRequest(served.prompt(4), 6, 0)
    expected = answers(served.engine, [request])[0].ids
    served.engine._batch.step = lambda *_, **__: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    failed = answers(served.engine, [request])[0]
    assert failed.error == "generation failed: division by zero"
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert answers(served.engine, [request])[0].ids == expected
    served.close()


def test_a_full_queue_and_a_stopped_engine_refuse(model_folder: Path) -> None:
    served = Served(model_folder, max_waiting=2)
    jobs = [Collector(TextRequest(served.prompt(4), 2)).job for _ in range(3)]
    with pytest.raises(QueueFullError):
        served.engine.submit(jobs)
    running = Collector(TextRequest(served.prompt(4), 50, 0))
    served.engine.submit([running.job])
    served.engine.stop()
    with pytest.raises(StoppedError):
        served.engine.submit(jobs[:1])
    assert len(running.answer().ids) == 50  # accepted before the stop
    served.close()


def test_clients_take_turns(model_folder: Path) -> None:
    served = Served(model_folder, max_rows=1)
    order: list[str] = []
    greedy_client = [Collector(TextRequest(served.prompt(4), 4), client="a") for _ in range(4)]
    modest_client = [Collector(TextRequest(served.prompt(4), 4), client="b")]
    for collector in (*greedy_client, *modest_client):
        put = collector.job.listener

        def listen(progress: Any, put: Any = put, client: str = collector.job.client) -> None:
            order.append(client)
            put(progress)

        collector.job.listener = listen
    served.engine.submit([collector.job for collector in (*greedy_client, *modest_client)])
    for collector in (*greedy_client, *modest_client):
        collector.answer()
    assert order.index("b") <= 1
    served.close()


@pytest.fixture(scope="module")
def ensembles(tmp_path_factory: pytest.TempPathFactory, new_workspace: Any) -> Path:
    from expertctl.workspace import Workspace

    root: Path = new_workspace(tmp_path_factory.mktemp("served") / "workspace")
    workspace = Workspace(root)
    experts = ["code", "law", "news"]
    workspace.merge("all", method="ensemble", experts=experts, options={"prior": "uniform"})
    workspace.merge("top", method="ensemble", experts=experts, options={"prior": "uniform", "top_k": 1, "every": 4})
    workspace.merge("stitched", method="stitch", experts=experts)
    return root / "generalists"


@pytest.mark.parametrize(("name", "mode"), [("all", "batched"), ("stitched", "batched"), ("top", "cached")])
def test_models_of_several_members(ensembles: Path, name: str, mode: str) -> None:
    served = Served(ensembles / name)
    has_shares = name != "stitched"
    assert served.engine.mode == mode
    requests = many(served, 8, shares=has_shares)
    alone = [answers(served.engine, [request])[0].ids for request in requests]
    together = answers(served.engine, requests)
    assert [answer.ids for answer in together] == alone
    greedy = requests[0]
    assert together[0].ids == served.greedy(greedy.prompt, greedy.max_tokens)
    for request, answer in zip(requests if has_shares else (), together, strict=False):
        text = torch.tensor([[*request.prompt, *answer.ids]])
        wanted = served.model.responsibilities(text)[0, len(request.prompt) - 1 :]
        got = torch.tensor([list((token.shares or {}).values()) for token in answer.tokens])
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    served.close()
