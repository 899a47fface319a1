"""Benchmark of judging: seconds from complete deliveries of small experts to their verdicts, with real scoring processes.

    python examples/benchmarks/judging.py --deliveries 50

Every owner has a key of its own and delivers a trained expert of a seed of 1.3 million parameters; all deliveries are complete
before the clock starts. A coordinator then judges them as `expertctl federate serve` does: every check, and the loss on
public text in processes that are started for the first deliveries and stay warm.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from whole_numbers import at_least

from expertctl import Workspace
from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.judging.judges import Judges
from expertctl.experts.federation.owner.owner import Owner, OwnerSettings
from expertctl.experts.federation.owner.work import work
from expertctl.experts.federation.protocol.keys import make_key
from expertctl.experts.federation.protocol.parts import read_part
from expertctl.experts.federation.protocol.requests import ExpertRequest, Recipe

TRAINING = {"tokens": 2048, "batch_size": 4, "learning_rate": 1e-3}
CONFIG = """
domains: {python: {bundled: python}, manual: {bundled: manual}}
seed: {preset: tiny, training: {tokens: 20000}}
experts: {}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deliveries", type=at_least(1), default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "expertctl.yaml").write_text(CONFIG)
        workspace = Workspace(root)
        workspace.seed()
        judges = Judges(workspace.layout)
        coordinator = Coordinator(workspace.layout, measure=judges, judged_at_once=judges.count)
        requests = handed_in(coordinator, root, options.deliveries)
        begin = time.perf_counter()
        with ThreadPoolExecutor(judges.count) as threads:
            refusals = list(threads.map(coordinator.finish, requests))
        seconds = time.perf_counter() - begin
        refused = [str(refusal) for refusal in refusals if refusal is not None]
    print(
        f"{len(requests)} deliveries judged in {seconds:.1f} s, {judges.count} at a time "
        f"({seconds / len(requests):.2f} s each); refused: {refused or 'none'}"
    )


def handed_in(coordinator: Coordinator, root: Path, count: int) -> list[ExpertRequest]:
    """Return requests of as many owners, whose deliveries are complete and not judged."""
    text = root / "text.jsonl"
    lines = Path(argparse.__file__).read_text(encoding="utf-8").splitlines()
    documents = ("\n".join(lines[begin : begin + 50]) for begin in range(0, len(lines), 50))
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    owners = {}
    for number in range(count):
        name = f"owner-{number}"
        make_key(root / "owners" / name)
        owners[name] = Owner(root / "owners" / name)
        owners[name].configure(OwnerSettings(text))
        coordinator.invite(name, owners[name].key().public)
    requests = []
    for number, (name, owner) in enumerate(owners.items()):
        recipe = Recipe("feed_forward", {}, {**TRAINING, "seed": number})
        requests += coordinator.ask([name], recipe, coordinator.now() + timedelta(days=1))
        hand_in(coordinator, owner, requests[-1])
    return requests


def hand_in(coordinator: Coordinator, owner: Owner, request: ExpertRequest) -> None:
    owner.take(request)
    for writer in owner.seeds.writers(request):
        for index in writer.missing():
            path, *_ = coordinator.seed_span(request, writer.file.name, index)
            writer.put(index, read_part(path, writer.file, index))
    owner.seeds.complete(request)
    work(owner, request)
    signed = owner.delivery(request)
    missing = coordinator.begin(request, signed)
    assert isinstance(missing, dict), missing
    for file in signed.statement.files:
        for index in missing[file.name]:
            data = read_part(owner.delivery_folder(request) / file.name, file, index)
            coordinator.files.put(request.id, file.name, index, data)


if __name__ == "__main__":
    main()
