"""Distillation: its loss against a naive one, and a small model that learns from an ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import chat_model
from inline_launching import inline_launching
from transformers import AutoConfig, AutoModelForCausalLM

from expertctl import Batch, UserError, Workspace
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.models.loading import load_network
from expertctl.core.text.token_store import TokenBlocks
from expertctl.experts.training.steps.loss import next_token_loss
from expertctl.plugins.basics.distillation import Distillation, DistilOptions

VOCABULARY = 24


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.4
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def naive_loss(student: Any, teacher: Any, batch: Batch, options: DistilOptions) -> float:
    """Return the loss, one token after the other in float64."""
    total = count = 0.0
    for row in range(len(batch.tokens)):
        tokens = batch.tokens[row : row + 1, :-1]
        own, other = (model(tokens).logits[0].double() / options.temperature for model in (student, teacher))
        for place in range(tokens.shape[1]):
            if batch.counted is not None and not batch.counted[row, place]:
                continue
            p, q = other[place].softmax(-1), own[place].softmax(-1)
            if options.top_k is not None:
                chosen = p.topk(options.top_k).indices
                p, q = (torch.cat((x[chosen], 1 - x[chosen].sum()[None])) for x in (p, q))
            divergence = float((p * (p.log() - q.log())).sum()) * options.temperature**2
            truth = float(-(own[place] * options.temperature).log_softmax(-1)[batch.tokens[row, place + 1]])
            total += options.hard * truth + (1 - options.hard) * divergence
            count += 1
    return total / count


@pytest.mark.parametrize("is_counted", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        DistilOptions("t"),
        DistilOptions("t", 2.5, 0.3),
        DistilOptions("t", 1.5, 0.5, top_k=4),
        DistilOptions("t", top_k=99),
    ],
)
def test_the_loss_is_the_naive_one(options: DistilOptions, is_counted: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (3, 9), generator=generator)
    batch = Batch(tokens, torch.rand((3, 8), generator=generator) < 0.4 if is_counted else None)
    student, teacher = model_of(1), model_of(2)
    objective = Distillation(teacher, options, tmp_path / "cache")
    reference = DistilOptions("t", options.temperature, options.hard, options.top_k if options.top_k != 99 else None)
    with torch.no_grad():
        expected = naive_loss(student, teacher, batch, reference)
        for _ in range(2):  # from the teacher, and from what was kept
            loss = objective.loss(student, batch, next_token_loss)
            assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_a_teacher_reads_each_block_once_if_its_predictions_are_kept(tmp_path: Path) -> None:
    calls: list[int] = []
    student, teacher = model_of(1), model_of(2)
    teacher.register_forward_hook(lambda module, inputs, output: calls.append(1))
    batch = Batch(torch.arange(18).view(2, 9))
    losses = []
    for _ in range(2):
        objective = Distillation(teacher, DistilOptions("t", top_k=3), tmp_path)  # as after a restart
        losses += [objective.loss(student, batch, next_token_loss) for _ in range(2)]
    assert len(calls) == 1
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_a_batch_without_counted_tokens_has_no_loss(tmp_path: Path) -> None:
    batch = Batch(torch.arange(9)[None], torch.zeros(1, 8, dtype=torch.bool))
    loss = Distillation(model_of(1), DistilOptions("t", hard=0.5), tmp_path).loss(model_of(2), batch, next_token_loss)
    loss.backward()
    assert float(loss.detach()) == 0


def test_an_expert_learns_from_an_ensemble_of_others(project: Workspace) -> None:
    for name in ("prose", "chance"):
        project.branch(name, domain=name)
    with inline_launching():
        project.train()
    project.merge("forest", method="ensemble", options={"samples": 8})
    distil = {"objective": "distil", "objective_options": {"teacher": "forest", "top_k": 16}, "tokens": 10_240}
    project.branch("pupil", domain="prose", training=distil)
    with inline_launching():
        project.train("pupil").raise_for_failures()
    (prepared,) = project.prepare(["prose"])
    tokens = torch.from_numpy(TokenBlocks(prepared.open("test"), 32).block(0))[None]
    folders = {name: project.layout.artefact(name) for name in ("forest", "seed", "pupil")}
    with torch.no_grad():
        forest, *others = (
            load_network(folder, dtype="float32")(tokens, use_cache=False).logits.log_softmax(-1)
            for folder in folders.values()
        )
    seed, pupil = (torch.nn.functional.kl_div(own, forest, reduction="sum", log_target=True) for own in others)
    assert float(pupil) < 0.8 * float(seed)
    assert {parent.name for parent in read_manifest(folders["pupil"]).parents} == {"seed", "forest"}
    assert not (project.layout.experts / "pupil" / ".training").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a teacher; set objective_options"),
        ({"teacher": "nobody"}, "nobody"),
        ({"teacher": "seed", "temperature": 0}, "temperature is 0"),
        ({"teacher": "seed", "hard": 2}, "hard is 2"),
        ({"teecher": "seed"}, "did you mean 'teacher'"),
    ],
)
def test_teachers_that_cannot_be_are_refused(project: Workspace, options: dict[str, Any], message: str) -> None:
    training = {"objective": "distil", "objective_options": options}
    with pytest.raises(UserError, match=message):
        project.branch("pupil", domain="prose", training=training)


def test_a_teacher_of_another_tokenizer_is_refused(project: Workspace, tmp_path: Path) -> None:
    training = {"objective": "distil", "objective_options": {"teacher": str(chat_model(tmp_path / "other"))}}
    with pytest.raises(UserError, match="has another tokenizer"):
        project.branch("pupil", domain="prose", training=training)
    training["objective_options"] = {"teacher": "seed"}
    project.branch("pupil", domain="prose", training=training)
