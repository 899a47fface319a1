"""Training on conversations, against a plain loop over transformers' own templates and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import FORMATS, TALKS, TEMPLATES, chat_model, reference, talk
from transformers import AutoConfig, AutoModelForCausalLM

from expertctl import Conversation
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.errors import UserError
from expertctl.core.hooks.steps import Batch
from expertctl.core.models.scoring import total_loss
from expertctl.core.text.block_order import Position, shuffled
from expertctl.core.text.conversation_blocks import ConversationBlocks, ConversationWindows
from expertctl.core.text.rendering import ConversationEncoder
from expertctl.core.text.token_store import TokenStore, write_conversations
from expertctl.experts.runs.trainable import all_parameters
from expertctl.experts.training.distributed.ranks import Ranks
from expertctl.experts.training.steps.loop import TrainingLoop, learning_rate, progress_at

CONFIG = TrainingConfig(
    tokens=3 * 2 * 2 * 256, sequence_length=256, batch_size=2, accumulation=2, learning_rate=1e-3, device="cpu"
)
RECORDS = [*TALKS, talk("rain?", "no"), talk("law?", "return. " * 9, "key?", "")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


def stored(folder: Path, template: str, target: Path) -> TokenStore:
    target.mkdir(parents=True, exist_ok=True)
    encoder = ConversationEncoder.of_folder(folder, template, "assistant")
    texts = [Conversation(**record).as_text() for record in RECORDS]
    write_conversations(
        target, encoder.encode_stream(texts), markers=encoder.markers, vocabulary=encoder.vocabulary, shard_tokens=200
    )
    return TokenStore(target)


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def summed_loss(model: Any, ids: list[int], mask: list[int]) -> torch.Tensor:
    """Return the summed cross-entropy of the tokens that count, as transformers computes it from labels."""
    tokens = torch.tensor([ids])
    labels = torch.where(torch.tensor([mask], dtype=torch.bool), tokens, -100)
    return model(input_ids=tokens, labels=labels).loss * sum(mask[1:])


@pytest.mark.parametrize("name", FORMATS)
def test_losses_are_those_of_a_plain_loop(name: str, folder: Path, tmp_path: Path) -> None:
    blocks = ConversationBlocks(stored(folder, TEMPLATES[name], tmp_path), CONFIG.sequence_length)
    assert len(blocks) == len(RECORDS)
    loop = TrainingLoop(all_parameters(model_of(folder)), blocks, CONFIG)
    losses = [float(report.loss) for report in loop.steps()]

    model = model_of(folder).train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": CONFIG.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=CONFIG.betas,
        eps=CONFIG.epsilon,
    )
    examples = [reference(folder, record["messages"], TEMPLATES[name]) for record in RECORDS]
    position, expected = Position(), []
    for step in range(CONFIG.steps):
        chosen = []
        for _ in range(CONFIG.batch_size * CONFIG.accumulation):
            chosen.append(examples[shuffled(position.index, len(blocks), position.epoch)])
            position = position.advanced(1, len(blocks))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(CONFIG, progress_at(CONFIG, step))
        count = sum(sum(mask[1:]) for _, mask in chosen)
        loss = sum(summed_loss(model, ids, mask) for ids, mask in chosen) / count
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip or 0)
        optimiser.step()
        expected.append(float(loss.detach()))  # type: ignore[union-attr]
    assert losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"chunked_loss": True}])
def test_packed_conversations_have_the_losses_of_each_alone(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    store = stored(folder, TEMPLATES["chatml"], tmp_path)
    packed = ConversationBlocks(store, 256, packed=True)
    assert len(packed) < len(RECORDS)
    loop = TrainingLoop(all_parameters(model_of(folder)), packed, CONFIG.model_copy(update=settings))
    model = model_of(folder)
    examples = [reference(folder, record["messages"], TEMPLATES["chatml"]) for record in RECORDS]
    with torch.no_grad():
        total = count = 0.0
        for index in range(len(packed)):
            row = packed.row(index)
            assert row.counted is not None
            assert row.positions is not None
            batch = Batch(
                torch.from_numpy(row.tokens)[None],
                torch.from_numpy(row.counted)[None, 1:],
                torch.from_numpy(row.positions)[None, :-1],
            )
            total += float(loop._loss(batch)) * batch.num_counted
            count += batch.num_counted
        expected = sum(float(summed_loss(model, ids, mask)) for ids, mask in examples)
    assert count == sum(sum(mask[1:]) for _, mask in examples)
    assert total == pytest.approx(expected, rel=1e-5)


def test_a_model_that_reads_across_documents_does_not_pack(tmp_path: Path, folder: Path) -> None:
    blocks = ConversationBlocks(stored(folder, TEMPLATES["chatml"], tmp_path), 256, packed=True)
    config = AutoConfig.for_model("mamba", vocab_size=400, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"pack_conversations: this model .* cannot keep"):
        TrainingLoop(all_parameters(model), blocks, CONFIG)


def test_validation_counts_the_same_tokens_and_scores_text_only(folder: Path, tmp_path: Path) -> None:
    store = stored(folder, TEMPLATES["llama3"], tmp_path)
    model = model_of(folder).eval()
    examples = [reference(folder, record["messages"], TEMPLATES["llama3"]) for record in RECORDS]
    with torch.no_grad():
        expected = sum(float(summed_loss(model, ids, mask)) for ids, mask in examples)
        total, count = total_loss(model, ConversationBlocks(store, 256).windows(3))
        special = {int(token) for token in store.part.markers}
        texts = [
            (ids, [int(counts and token not in special) for token, counts in zip(ids, mask, strict=True)])
            for ids, mask in examples
        ]
        of_text = sum(float(summed_loss(model, ids, mask)) for ids, mask in texts if sum(mask))
        scored, scored_count = total_loss(model, ConversationWindows(store, 256, 128).batches(3))
    assert count == sum(sum(mask[1:]) for _, mask in examples)
    assert total == pytest.approx(expected, rel=1e-5)
    assert scored_count == sum(sum(mask[1:]) for _, mask in texts)
    assert scored == pytest.approx(of_text, rel=1e-5)


def test_processes_share_a_step_by_its_counted_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two halves of a batch with unequal numbers of counted tokens add up to the whole batch's gradient."""
    blocks = ConversationBlocks(stored(folder, TEMPLATES["chatml"], tmp_path), CONFIG.sequence_length)
    whole = TrainingLoop(all_parameters(model_of(folder)), blocks, CONFIG)
    loss = whole._accumulate()
    counts = []
    for rank in range(2):
        alone = TrainingLoop(all_parameters(model_of(folder)), blocks, CONFIG)
        alone.ranks = Ranks(rank, 2)
        counts.append([alone._batch()[1].num_counted for _ in range(CONFIG.accumulation)])
    assert sum(counts[0]) != sum(counts[1])
    monkeypatch.setattr(Ranks, "share", lambda self, values: [float(sum(map(sum, counts)))])
    gradients, losses = [], []
    for rank in range(2):
        half = TrainingLoop(all_parameters(model_of(folder)), blocks, CONFIG)
        half.ranks = Ranks(rank, 2)
        losses.append(float(half._accumulate()))
        gradients.append({name: parameter.grad for name, parameter in half.parameters.items()})
    assert sum(losses) / 2 == pytest.approx(float(loss), abs=1e-6)
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close((gradients[0][name] + gradients[1][name]) / 2, parameter.grad, atol=1e-6, rtol=1e-4)
