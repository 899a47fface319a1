"""Preference optimisation: its loss against a naive one, and an expert that learns what is preferred."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import TEMPLATES, chat_model, make_chat_project, reference, talk, write_records
from inline_launching import inline_launching
from transformers import AutoModelForCausalLM

from expertctl import Conversation, UserError, Workspace
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.models.loading import load_network
from expertctl.core.text.conversation_blocks import PairBlocks, blocks_of, windows_of
from expertctl.core.text.rendering import ConversationEncoder
from expertctl.core.text.token_store import TokenStore, write_conversations
from expertctl.experts.runs.trainable import all_parameters
from expertctl.experts.training.steps.loop import TrainingLoop, batch_of
from expertctl.experts.training.steps.loss import next_token_loss
from expertctl.plugins.basics.conversation_files import corpus_formats
from expertctl.plugins.basics.preferences import Preference

PAIRS = [
    {"prompt": f"what is {number}?", "chosen": f"it is {number}. " * (number % 3 + 1), "rejected": "who knows"}
    for number in range(40)
]
PREFERENCE = {"objective": "preference", "objective_options": {"beta": 0.5}}


def read(path: Path) -> list[Conversation]:
    (offer,) = [offer for offer in corpus_formats() if offer.name == "preference"]
    return [Conversation.of_text(text) for text in offer.read(path, "text")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> TokenStore:
    conversations = read(Path(write_records(tmp_path / "pairs.jsonl", PAIRS[:6])))
    encoder = ConversationEncoder.of_folder(folder, TEMPLATES["chatml"], "assistant")
    documents = encoder.encode_stream([conversation.as_text() for conversation in conversations], measure_loss=True)
    write_conversations(tmp_path, documents, markers=encoder.markers, vocabulary=encoder.vocabulary)
    return TokenStore(tmp_path)


def log_prob(model: Any, folder: Path, messages: list[Any]) -> float:
    """Return the summed log-probability of the assistant's tokens, in float64 by transformers alone."""
    ids, mask = reference(folder, messages, TEMPLATES["chatml"])
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(1, len(ids)) if mask[place])


def test_the_loss_is_the_naive_one(store: TokenStore, folder: Path) -> None:
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    blocks = blocks_of(store, 256)
    assert isinstance(blocks, PairBlocks)
    batch = batch_of([blocks.row(index) for index in range(len(blocks))], torch.device("cpu"))
    objective = Preference(copy.deepcopy(start), 0.3)
    loss = objective.loss(trained, batch, next_token_loss)
    expected, old, new = [], start.double(), copy.deepcopy(trained).double()
    for pair in PAIRS[:6]:
        talks = [talk(pair["prompt"], pair[name])["messages"] for name in ("chosen", "rejected")]
        margin = [log_prob(model, folder, talks[0]) - log_prob(model, folder, talks[1]) for model in (new, old)]
        expected.append(-torch.nn.functional.logsigmoid(torch.tensor(0.3 * (margin[0] - margin[1]))).item())
    assert float(loss.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert objective.num_terms(batch) == 6
    at_start = objective.loss(start.float(), batch, next_token_loss)
    assert float(at_start.detach()) == pytest.approx(0.6931472, abs=1e-5)


def test_counts_and_scores_are_those_of_the_better_answers(store: TokenStore, folder: Path) -> None:
    chosen = [
        reference(folder, talk(pair["prompt"], pair["chosen"])["messages"], TEMPLATES["chatml"]) for pair in PAIRS[:6]
    ]
    assert store.part.has_pairs
    assert store.part.documents == 6
    assert store.part.counted_tokens == sum(sum(mask) for _, mask in chosen)
    assert store.part.lost_bytes == 0
    scored = sum(int(window.scored.sum()) for window in blocks_of(store, 256).windows(4))
    assert scored == store.part.counted_tokens
    special = set(store.part.markers)
    of_text = sum(
        sum(counts and token not in special for token, counts in zip(ids, mask, strict=True)) for ids, mask in chosen
    )
    assert sum(int(batch.scored.sum()) for batch in windows_of(store, 64, 32).batches(4)) == of_text


def test_pairs_that_are_longer_than_a_block_are_left_out(store: TokenStore, folder: Path) -> None:
    sizes = sorted(store.ends[1::2] - [0, *store.ends[1:-1:2]])
    blocks = blocks_of(store, int(sizes[2]) - 1)
    assert isinstance(blocks, PairBlocks)
    assert len(blocks) == 3 + sum(size == sizes[2] for size in sizes[3:])
    assert blocks.num_left_out == 6 - len(blocks)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = TrainingConfig(sequence_length=blocks.block_size, batch_size=1, device="cpu")
    loop = TrainingLoop(all_parameters(model), blocks, config)
    assert f"{blocks.num_left_out} pairs are longer than training.sequence_length and are left out" in loop.notes


def test_messages_and_text_give_the_same_pairs(tmp_path: Path) -> None:
    user, answers = {"role": "user", "content": "a"}, [{"role": "assistant", "content": text} for text in "bc"]
    records = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [user], "chosen": [answers[0]], "rejected": [answers[1]]},
        {"chosen": [user, answers[0]], "rejected": [user, answers[1]]},
    ]
    first, *others = read(Path(write_records(tmp_path / "a.jsonl", records)))
    assert all(other == first for other in others)
    assert [part.messages[-1]["content"] for part in first.parts()] == ["b", "c"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the chosen and the rejected answer are equal"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' is missing or neither"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "no turn of the assistant"),
    ],
)
def test_records_that_are_no_pairs_are_named(tmp_path: Path, record: Any, message: str) -> None:
    path = Path(write_records(tmp_path / "a.jsonl", [record]))
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:1")


def test_an_expert_learns_what_is_preferred(tmp_path: Path) -> None:
    write_records(tmp_path / "pairs.jsonl", PAIRS)
    workspace = make_chat_project(tmp_path, {}, domains={"pairs": {"path": "pairs.jsonl", "format": "preference"}})
    with pytest.raises(UserError, match="reads text and conversations, and domain 'pairs' holds pairs"):
        workspace.branch("polite", domain="pairs")
    with pytest.raises(UserError, match="reads pairs, and domain 'talks' holds conversations"):
        workspace.branch("polite", domain="talks", training=PREFERENCE)
    workspace.branch("polite", domain="pairs", training=PREFERENCE)
    with inline_launching():
        workspace.train("polite").raise_for_failures()
    losses = [
        json.loads(line) for line in (workspace.layout.experts / "polite" / "metrics.jsonl").read_text().splitlines()
    ]
    assert next(line["loss"] for line in losses if "loss" in line) < 0.7
    margins = _margins(workspace, ("seed", "polite"))
    assert margins["polite"] > margins["seed"] + 1


def _margins(workspace: Workspace, names: tuple[str, ...]) -> dict[str, float]:
    """Return log p(chosen) - log p(rejected) of the first pair under models."""
    talks = [talk(PAIRS[0]["prompt"], PAIRS[0][name])["messages"] for name in ("chosen", "rejected")]
    models = {name: load_network(workspace.layout.artefact(name), dtype="float32") for name in names}
    return {
        name: log_prob(model, workspace.layout.seed, talks[0]) - log_prob(model, workspace.layout.seed, talks[1])
        for name, model in models.items()
    }
