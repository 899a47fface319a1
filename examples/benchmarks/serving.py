"""Benchmark of the server: one client against plain `generate`, twenty clients against one after another, and a soak.

    python examples/benchmarks/serving.py
    python examples/benchmarks/serving.py --requests 10000

Serves a model of random weights in this process. Clients are threads with connections of their own. What is compared is
measured in turns, round by round, and ratios are medians over the rounds, so that other work on the machine falls on both.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from whole_numbers import at_least

HOST = "127.0.0.1"


class Client:
    """A connection that is kept."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=600)

    def complete(self, prompt: list[int], tokens: int, *, stream: bool = False) -> str:
        """Return the greedy continuation of a prompt."""
        body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        self._connection.request("POST", "/v1/completions", json.dumps({**body, "stream": stream}))
        response = self._connection.getresponse()
        content = response.read().decode()
        if response.status != 200:
            raise SystemExit(f"status {response.status}: {content}")
        if not stream:
            return str(json.loads(content)["choices"][0]["text"])
        events = [line[6:] for line in content.splitlines() if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    def close(self) -> None:
        self._connection.close()


def write_model(folder: Path) -> int:
    """Write a Llama of 1.3 million parameters with a tokenizer; return the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from expertctl.core.text.tokenizer import train_tokenizer

    folder.mkdir()
    sentences = [Path(__file__).read_text(encoding="utf-8")]
    train_tokenizer(sentences, 2048, folder, max_length=512)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compare_with_generate(given: argparse.Namespace, port: int, folder: Path) -> None:
    """Print how long one client waits, relative to `generate` of transformers in this process."""
    import torch

    from expertctl.core.models.loading import load_model

    model, _ = load_model(folder)
    prompt = list(range(10, 30))
    client = Client(port)

    def plain() -> None:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=given.tokens,
                min_new_tokens=given.tokens,
                do_sample=False,
            )

    variants = {
        "generate": plain,
        "server, whole answer": lambda: client.complete(prompt, given.tokens),
        "server, streamed": lambda: client.complete(prompt, given.tokens, stream=True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(given.rounds + 1):
        for name, work in variants.items():
            spent = seconds(work)
            if number:  # the first round warms up
                times[name].append(spent)
    client.close()
    print(f"| one client, {given.tokens} tokens | s, median | times generate, median |\n|---|---|---|")
    for name, spent in times.items():
        ratios = [own / other for own, other in zip(spent, times["generate"], strict=True)]
        print(f"| {name} | {statistics.median(spent):.3f} | {statistics.median(ratios):.2f} |")


def compare_clients(given: argparse.Namespace, port: int) -> None:
    """Print the throughput of clients at once, relative to the same requests one after another."""
    prompts = [list(range(10 + number, 20 + number + number % 7)) for number in range(given.clients)]
    clients = [Client(port) for _ in prompts]
    alone = [client.complete(prompt, given.tokens) for client, prompt in zip(clients, prompts, strict=True)]
    print(
        f"\n| {given.clients} clients, {given.tokens} tokens each | tokens/s, median | times one after another, median |"
    )
    print("|---|---|---|")
    one_after_another, at_once, streamed = [], [], []
    with ThreadPoolExecutor(given.clients) as pool:

        def together(stream: bool) -> None:
            texts = list(
                pool.map(
                    lambda pair: pair[0].complete(pair[1], given.tokens, stream=stream),
                    zip(clients, prompts, strict=True),
                )
            )
            if texts != alone:
                raise SystemExit("a text differs from the one of the same request alone")

        for _ in range(given.rounds):
            one_after_another.append(seconds(lambda: [clients[0].complete(prompt, given.tokens) for prompt in prompts]))
            at_once.append(seconds(lambda: together(False)))
            streamed.append(seconds(lambda: together(True)))
    for client in clients:
        client.close()
    total = given.clients * given.tokens
    for name, spent in (
        ("one after another", one_after_another),
        ("at once", at_once),
        ("at once, streamed", streamed),
    ):
        ratio = statistics.median(first / own for first, own in zip(one_after_another, spent, strict=True))
        print(f"| {name} | {total / statistics.median(spent):,.0f} | {ratio:.1f} |")


def soak(given: argparse.Namespace, port: int) -> None:
    """Print memory, open files and threads after each fifth of many requests, some of which are given up."""
    columns = "requests | MB resident | open files | threads | Python objects"
    print(f"\n| {columns} |\n|---|---|---|---|---|")
    part = max(given.requests // 5, given.clients)

    def work(number: int) -> None:
        client = Client(port)
        for step in range(part // given.clients):
            prompt = list(range(5, 8 + (number + step) % 9))
            if step % 10 == 9:  # a client that hangs up
                body = json.dumps({"model": "model", "prompt": prompt, "max_tokens": 200, "stream": True})
                hung = http.client.HTTPConnection(HOST, port)
                hung.request("POST", "/v1/completions", body)
                hung.getresponse().close()
                hung.close()
            else:
                client.complete(prompt, 4, stream=step % 2 == 1)
        client.close()

    for number in range(5):
        with ThreadPoolExecutor(given.clients) as pool:
            list(pool.map(work, range(given.clients)))
        time.sleep(1)
        gc.collect()
        statm = Path("/proc/self/statm").read_text(encoding="utf-8").split()
        resident = int(statm[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        files = len(list(Path("/proc/self/fd").iterdir()))
        done = (number + 1) * (part // given.clients) * given.clients
        print(
            f"| {done:,} | {resident:.0f} | {files} | {threading.active_count()} | {len(gc.get_objects()):,} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--tokens", type=at_least(2), default=64)
    parser.add_argument("--clients", type=at_least(1), default=20)
    parser.add_argument("--requests", type=at_least(0), default=0, help="of the soak; 0 leaves it out")
    given = parser.parse_args()

    import torch

    from expertctl.serving.app import server_app
    from expertctl.serving.limits import Limits
    from expertctl.serving.models import ServedModel
    from expertctl.serving.server import Server, bind, stop_engines

    torch.set_num_threads(1)
    sys.setswitchinterval(0.0005)
    with tempfile.TemporaryDirectory() as temporary, bind(HOST, 0) as opened:
        folder = Path(temporary) / "model"
        parameters = write_model(folder)
        limits = Limits()
        models = [ServedModel("model", folder, limits)]
        opened.listen(128)
        server = Server(server_app(models, limits), limits)
        thread = threading.Thread(target=server.run, args=([opened],))
        thread.start()
        port = int(opened.getsockname()[1])
        print(f"{parameters:,} parameters, median of {given.rounds} rounds\n")
        compare_with_generate(given, port, folder)
        compare_clients(given, port)
        if given.requests:
            soak(given, port)
        server.should_exit = True
        thread.join()
        stop_engines(models, 5)


if __name__ == "__main__":
    main()
