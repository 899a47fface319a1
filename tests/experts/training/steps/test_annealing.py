"""Annealing, against a plain loop that draws the chosen domains and lowers the learning rate itself."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from expertctl import UserError
from expertctl.core.config.phases import require_phases
from expertctl.core.config.settings import TrainingConfig, validate_settings
from expertctl.core.text.block_order import Position, SharedUnion, draw
from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
from expertctl.experts.runs.trainable import all_parameters
from expertctl.experts.training.checkpointing import restore_latest, save_checkpoint
from expertctl.experts.training.steps.averaging import WeightAverage
from expertctl.experts.training.steps.block_stream import ANNEALING_SEED, BlockStream
from expertctl.experts.training.steps.loop import StepReport, TrainingLoop
from expertctl.experts.training.steps.schedule import learning_rate, progress_at

SETTINGS: dict[str, Any] = {
    "tokens": 10 * 4 * 16,
    "sequence_length": 16,
    "batch_size": 2,
    "accumulation": 2,
    "learning_rate": 1e-2,
    "device": "cpu",
    "seed": 3,
    "annealing": {"share": 0.4, "domains": {"law": 3, "own": 1}},
}


def config_of(**changes: Any) -> TrainingConfig:
    return validate_settings(TrainingConfig, SETTINGS | changes, "training")


CONFIG = config_of()


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=64))


@pytest.fixture
def domains(tmp_path: Path) -> tuple[TokenBlocks, TokenBlocks]:
    """The run's own text and that of `law`, which have no token in common but the separator."""
    parts = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        ids = np.random.default_rng(number).integers(1 + 30 * number, 30 + 30 * number, size=(40, 30)).tolist()
        write_part(folder, [EncodedDocument("x" * 30, row) for row in ids], separator=0, vocabulary=64)
        parts.append(TokenBlocks(TokenStore(folder), 16))
    return parts[0], parts[1]


def loop_of(domains: tuple[TokenBlocks, TokenBlocks], config: TrainingConfig = CONFIG) -> TrainingLoop:
    own, law = domains
    stream = BlockStream(SharedUnion([law, own], [3, 1]), config.seed + ANNEALING_SEED, (1, 0))
    return TrainingLoop(all_parameters(tiny_model()), own, config, annealing=stream)


def reports_of(loop: TrainingLoop, steps: int | None = None) -> list[StepReport]:
    reports = []
    for report in loop.steps():
        reports.append(report)
        if report.step == steps:
            break
    return reports


def test_losses_and_weights_are_those_of_a_plain_loop(domains: tuple[TokenBlocks, TokenBlocks]) -> None:
    loop = loop_of(domains)
    reports = reports_of(loop)
    own, law = domains
    model = tiny_model().train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.epsilon)
    union, seen = SharedUnion([law, own], [3, 1]), [0, 0]
    plain = config_of(annealing=None)
    at_begin = learning_rate(plain, 0.6)
    for step in range(10):
        rows = []
        for _ in range(4):
            anneals = step >= 6
            text, seed = (union, CONFIG.seed + ANNEALING_SEED) if anneals else (own, CONFIG.seed)
            epoch, index = divmod(seen[anneals], len(text))
            rows.append(draw(text, Position(epoch, index), seed).tokens)
            seen[anneals] += 1
        tokens = torch.from_numpy(np.stack(rows))
        rate = at_begin * (10 - step - 0.5) / 4 if step >= 6 else learning_rate(plain, progress_at(plain, step))
        assert reports[step].learning_rate == pytest.approx(rate, rel=1e-9)
        for group in optimiser.param_groups:
            group["lr"] = rate
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        assert float(reports[step].loss) == pytest.approx(loss.item(), abs=1e-5), step
        assert reports[step].drawn == ({0: 4} if step < 6 else {1: 3, 0: 1})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loop.parameters[name], parameter, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stop", [2, 6, 7, 9])
@pytest.mark.parametrize("average", ["none", "last", "ema"])
def test_going_on_from_a_checkpoint_gives_the_same_bits(
    domains: tuple[TokenBlocks, TokenBlocks], tmp_path: Path, stop: int, average: str
) -> None:
    config = config_of(average=average, average_points=3, average_every=1)
    whole, first, second = (loop_of(domains, config) for _ in range(3))
    losses = [float(report.loss) for report in reports_of(whole)]
    begun = [float(report.loss) for report in reports_of(first, stop)]
    save_checkpoint(first, tmp_path / "state")
    assert restore_latest(second, tmp_path / "state") == stop
    assert begun + [float(report.loss) for report in reports_of(second)] == losses
    for loop in (whole, second):
        loop.average.apply(loop.parameters)
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


@pytest.mark.parametrize(
    ("settings", "included"),
    [
        ({"average": "last", "average_points": 3, "average_every": 1}, [8, 9, 10]),
        ({"average": "last", "average_points": 50, "average_every": 1}, [7, 8, 9, 10]),
        ({"average": "last", "average_points": 50, "average_every": 3}, [7, 10]),
        ({"average": "last", "average_points": 5, "average_every": 10}, [10]),
    ],
)
def test_an_average_has_only_weights_of_the_annealing(
    domains: tuple[TokenBlocks, TokenBlocks], settings: dict[str, Any], included: list[int]
) -> None:
    loop = loop_of(domains, config_of(**settings))
    history = {}
    for report in loop.steps():
        history[report.step] = {name: value.detach().double().clone() for name, value in loop.parameters.items()}
    for name, tensor in loop.average.tensors.items():
        expected = torch.stack([history[step][name] for step in included]).mean(dim=0)
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=0)
    assert loop.average.tensors.keys() == loop.parameters.keys()


def test_a_moving_average_begins_with_the_annealing() -> None:
    average = WeightAverage(config_of(average="ema"))
    assert [average.number_at(step) for step in range(11)] == [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]


@given(
    st.sampled_from(["linear", "cosine", "constant", "wsd", "restarts"]),
    st.floats(0.02, 0.9),
    st.integers(5, 200),
    st.sampled_from([(0.0, 1.0), (0.5, 1.0), (0.0, 0.5)]),
)
def test_the_learning_rate_falls_by_equal_steps_to_zero(
    schedule: str, share: float, steps: int, span: tuple[float, float]
) -> None:
    changes = {"schedule": schedule, "tokens": steps * 64, "schedule_begin": span[0], "schedule_end": span[1]}
    config = config_of(**changes, annealing={"share": share, "domains": ["law"]})
    begin = config.annealing_begin
    assert abs((steps - begin) - share * steps) <= 0.5 + 1e-9
    rates = [learning_rate(config, progress_at(config, step)) for step in range(steps)]
    plain = config_of(**changes, annealing=None, **({"decay": 0.0} if schedule == "wsd" else {}))
    assert rates[:begin] == [learning_rate(plain, progress_at(plain, step)) for step in range(begin)]
    falling = rates[begin:]
    if falling and begin:
        fall = falling[-1] * 2
        assert all(first - second == pytest.approx(fall, rel=1e-6) for first, second in pairwise(falling))
        if schedule == "wsd" and span == (0.0, 1.0) and begin / steps > config.warmup:
            assert falling[0] == pytest.approx(config.learning_rate * (1 - 0.5 / len(falling)))


@given(st.floats(0.05, 0.95), st.integers(20, 300))
def test_domains_have_their_shares_of_the_blocks(share: float, count: int) -> None:
    class Numbered:
        block_size = 1

        def __len__(self) -> int:
            return 7

        def row(self, index: int) -> Any:
            raise AssertionError

    stream = BlockStream(SharedUnion([Numbered(), Numbered()], [share, 1 - share]), 0, (4, 2))
    drawn = []
    for _ in range(count):
        drawn.append(stream.domain)
        stream.advance()
    assert set(drawn) <= {4, 2}
    assert abs(drawn.count(4) - share * count) <= 1


@pytest.mark.parametrize(
    ("annealing", "message"),
    [
        ({"share": 0.01, "domains": ["law"]}, "the run has 10 steps, and annealing rounds to none"),
        ({"share": 0.99, "domains": ["law"]}, "the run has 10 steps, and the part before it rounds to none"),
        ({"share": 0.1, "domains": {"law": 1, "own": 9}}, r"'law' has 0.1 of 4 blocks, which is too little"),
        ({"share": 0.9, "domains": {"law": 1e-9, "own": 1}}, r"'law' has 1e-09 of 36 blocks, which is too little"),
    ],
)
def test_an_annealing_that_does_not_fit_a_run_is_refused(annealing: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_phases(config_of(annealing=annealing))


@pytest.mark.parametrize(
    ("annealing", "message"),
    [
        ({"share": 1, "domains": ["law"]}, "less than 1"),
        ({"share": 0, "domains": ["law"]}, "greater than 0"),
        ({"share": 0.5, "domains": []}, "domains"),
        ({"share": 0.5}, "domains"),
        ({"share": 0.5, "domains": ["law", "law"]}, "a domain is named twice"),
        ({"share": 0.5, "domains": {"law": 0}}, "greater than 0"),
        ({"share": 0.5, "domains": {"law": -1}}, "greater than 0"),
        ({"share": 0.5, "domain": "law"}, "unknown key 'domain'"),
    ],
)
def test_an_annealing_that_makes_no_sense_is_refused(annealing: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(annealing=annealing)


def test_a_decay_of_another_length_than_the_annealing_is_refused() -> None:
    require_phases(config_of(schedule="wsd"))
    require_phases(config_of(schedule="wsd", decay=0.4))
    with pytest.raises(UserError, match=r"training.decay is 0.2 and annealing.share 0.4"):
        require_phases(config_of(schedule="wsd", decay=0.2))
