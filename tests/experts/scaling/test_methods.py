"""Plans of methods: limits that have to hold, whatever the numbers, and sums worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertctl import UserError
from expertctl.experts.scaling.hardware import HARDWARE_FILE, Hardware, bandwidth_gbit, hardware
from expertctl.experts.scaling.methods import METHODS, Plan, Scenario, plans
from expertctl.experts.scaling.shape import named_shape

ROUND = Hardware("round", 1000, 100, 1000, 100, 8, 0.5, 2.0)
SCENARIO = Scenario(named_shape("7b"), ROUND, 64, 800, 1e11, 4e6, 4096, 8, 0.5, 0.1, 500)


def planned(scenario: Scenario) -> dict[str, Plan]:
    return {plan.method: plan for plan in plans(scenario)}


def test_a_dense_model_takes_its_operations_divided_by_speed() -> None:
    shape = SCENARIO.shape
    operations = 1e11 * (6 * shape.multiplied + 6 * 4096 * shape.hidden * shape.layers)
    found = planned(replace(SCENARIO, link_gbit=1e9))
    assert found["fsdp"].days == pytest.approx(operations / (64 * 0.5e15) / 86_400, rel=1e-3)
    assert found["fsdp"].dollars == pytest.approx(64 * 24 * found["fsdp"].days * 2)
    assert found["data parallel"].gb_per_device > 16 * shape.parameters / 1e9
    assert found["fsdp"].gb_per_device < found["data parallel"].gb_per_device / 4


def test_a_slow_link_costs_methods_by_what_they_send() -> None:
    """By hand: 0.8 Gbit/s are 0.1 GB/s, so that 8 bytes of each of 6.74 billion parameters take 539 s."""
    found = planned(replace(SCENARIO, link_gbit=0.8))
    steps = 1e11 / 4e6
    sending = 8 * SCENARIO.shape.parameters * 63 / 64 / 1e8
    assert found["fsdp"].days == pytest.approx(steps * sending / 86_400, rel=1e-3)
    # a seed by FSDP for half of the tokens, then experts that fit a node each and send nothing
    assert found["branch-train-merge"].node_terabytes == pytest.approx(found["fsdp"].node_terabytes / 2)
    assert found["diloco"].node_terabytes == pytest.approx(steps / 500 * 8 * SCENARIO.shape.parameters * 7 / 8 / 1e12)
    assert found["diloco"].days < found["branch-train-merge"].days < found["fsdp"].days
    apart = planned(replace(SCENARIO, link_gbit=0.8, seed_share=0.0))["branch-train-merge"]
    assert apart.node_terabytes == 0
    assert apart.busy == pytest.approx(1)


def test_a_batch_that_is_too_small_for_the_devices_leaves_them_idle() -> None:
    linked = replace(ROUND, linked_gb_per_s=1e6)
    found = planned(replace(SCENARIO, hardware=linked, devices=4096, link_gbit=1e9))["fsdp"]
    assert found.busy == pytest.approx(int(4e6 // 4096) / 4096, rel=0.01)


@given(
    st.sampled_from([8, 64, 512, 4096]),
    st.sampled_from([1.0, 100.0, 3200.0]),
    st.sampled_from([1, 2, 8]),
    st.floats(0, 0.6),
    st.floats(0, 0.3),
)
def test_plans_keep_to_what_is_possible(devices: int, link: float, experts: int, seed: float, finetune: float) -> None:
    scenario = replace(
        SCENARIO, devices=devices, link_gbit=link, experts=experts, seed_share=seed, finetune_share=finetune
    )
    found = planned(scenario)
    assert list(found) == list(METHODS)
    faster = planned(replace(scenario, link_gbit=2 * link))
    for name, plan in found.items():
        assert 0 < plan.busy <= 1 + 1e-9
        assert plan.days > 0
        assert faster[name].days <= plan.days * (1 + 1e-9)
        assert plan.node_terabytes == 0 or devices > ROUND.per_node
    if experts == 1:
        assert found["branch-train-merge"].days == pytest.approx(found["fsdp"].days)


def test_published_sizes_come_out() -> None:
    """Branch-Train-Stitch (arXiv:2502.00075, table 2) has 264 million stitch parameters for three experts of width 3072."""
    shape = replace(SCENARIO.shape, hidden=3072)
    stitches = METHODS["branch-train-stitch"](replace(SCENARIO, shape=shape, experts=3, devices=63))[-1].trained
    assert stitches == pytest.approx(264e6, rel=0.01)
    # Branch-Train-MiX (arXiv:2403.07816): 23% of its compute follows the merge, of 453 and 80 billion tokens
    tokens = 533e9
    run = replace(SCENARIO, experts=4, tokens=tokens, seed_share=0.0, finetune_share=80 / 533, link_gbit=1e9)
    _, apart, together = METHODS["branch-train-mix"](run)
    work = [phase.tokens * phase.flops for phase in (apart, together)]
    assert work[1] / sum(work) == pytest.approx(0.23, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 12}, "12 devices cannot be shared equally by 8 experts"),
        ({"seed_share": 0.9}, "leave no tokens for experts"),
        ({"seed_share": float("nan")}, "the shares of seed and finetuning are nan"),
        ({"devices": 8 * 10**400}, "devices is 80000"),
        ({"batch_tokens": 4096.0}, "less than one block"),
        ({"tokens": float("nan")}, "tokens is nan; give a number above 0"),
    ],
)
def test_scenarios_without_sense_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SCENARIO, **changes)


def test_hardware_is_read_from_files(tmp_path: Path) -> None:
    assert hardware("h100").tflops == 989
    file = tmp_path / "mine.yaml"
    file.write_text(HARDWARE_FILE.read_text().replace("a100:", "mine:"))
    assert hardware("mine", file).gb == 80
    with pytest.raises(UserError, match="no hardware 'mine'"):
        hardware("mine")
    for number, (content, message) in enumerate(
        [
            ("mine: {tflops: 1}", "give tflops, gb, gb_per_s"),
            (file.read_text().replace("80", "-80"), "gb is -80; give a number above 0"),
            ("[1, 2]", "give a mapping"),
            ("a: [", "cannot be read as YAML"),
            ("a: " + "[" * 3000, "cannot be read as YAML"),
            ("1: {tflops: 1}", "give a mapping of names"),
            (file.read_text().replace("80", ".inf"), "gb is inf; give a number above 0"),
            (file.read_text().replace("efficiency: 0.", "efficiency: 1."), "efficiency at most 1"),
        ]
    ):
        wrong = tmp_path / f"wrong-{number}.yaml"
        wrong.write_text(content)
        with pytest.raises(UserError, match=message):
            hardware("mine", wrong)
    assert bandwidth_gbit("25") == 25
    for word in ("-1", "inf", "nan", "wifi"):
        with pytest.raises(UserError, match=f"no link '{word}'"):
            bandwidth_gbit(word)
