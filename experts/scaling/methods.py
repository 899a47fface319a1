"""Memory, time, traffic and cost of training by data parallelism, FSDP, DiLoCo and by experts that are trained apart.

A method is a sequence of phases; in each, groups of devices train without exchanging anything between groups. Assumptions: devices
reach the stated share of their speed; FSDP hides communication behind all of a step's computation, data parallelism behind its
backward pass; a node's devices send what leaves the node once over its link; a forward pass has one block per device, logits in
pieces; weights, gradients and moments are float32, passes bfloat16. The bytes per activation are half of those that
`step_model` finds in float32 on a CPU; no GPU was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...core.errors import UserError
from .hardware import LARGEST, Hardware
from .shape import ModelShape

ACTIVATION_BYTES = 9.0
"""Per token, layer and unit of `4 hidden + feed_forward`."""
STATE_BYTES = 16
"""Per trained parameter: weight, gradient and two moments in float32."""
FROZEN_BYTES = 2
"""Per frozen parameter, in bfloat16."""
DAY_S = 86_400


@dataclass(frozen=True)
class Scenario:
    """What is to be trained, and on what."""

    shape: ModelShape
    hardware: Hardware
    devices: int
    link_gbit: float
    """Bandwidth between two nodes, in Gbit/s each direction."""
    tokens: float
    """Tokens of all phases and experts together."""
    batch_tokens: float
    """Tokens of an update of one model on all text; experts have an equal share."""
    length: int
    experts: int
    seed_share: float
    """Share of the tokens that the seed is trained on."""
    finetune_share: float
    """Share of the tokens that follow the merge, where a method has such training."""
    sync_every: int
    """DiLoCo: steps between exchanges."""
    top_k: int = 2
    """Experts of a mixture that are active for a token."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "devices", "experts", "length", "sync_every"):
            amount = getattr(self, name)
            if not 0 < amount < LARGEST:
                raise UserError(f"{name} is {amount!s:.40}; give a number above 0, at most {LARGEST:g}")
        if not (self.seed_share >= 0 and self.finetune_share >= 0):
            raise UserError(
                f"the shares of seed and finetuning are {self.seed_share} and {self.finetune_share}; give 0 to 1"
            )
        if self.devices % self.experts:
            raise UserError(
                f"{self.devices} devices cannot be shared equally by {self.experts} experts; change one of them"
            )
        if self.seed_share + self.finetune_share >= 1:
            raise UserError("the shares of seed and finetuning leave no tokens for experts; lower one of them")
        if self.batch_tokens / self.experts < self.length:
            raise UserError(
                "an expert's share of an update is less than one block; raise the batch or lower the length"
            )


@dataclass(frozen=True)
class Phase:
    """Training of one model, or of several alike at the same time, each by a group of devices."""

    tokens: float
    """Of all groups together."""
    groups: int
    trained: float
    """Parameters that are trained."""
    frozen: float = 0.0
    flops: float = 0.0
    """Per token, for the forward and backward pass."""
    sharded: bool = True
    """Whether a group shards the model (FSDP) or replicates it (data parallelism)."""
    rounds_of: int | None = None
    """DiLoCo: steps between averages over all groups."""


@dataclass(frozen=True)
class Plan:
    """What a method needs in a scenario."""

    method: str
    devices: int
    gb_per_device: float
    fits: bool
    days: float
    busy: float
    """Share of the time that devices compute, rather than wait for links or for want of blocks."""
    node_terabytes: float
    """Sent by each node over its link, in all."""
    dollars: float


def plans(scenario: Scenario) -> list[Plan]:
    """Return the plan of every method."""
    return [_plan(name, phases(scenario), scenario) for name, phases in METHODS.items()]


def _plan(method: str, phases: list[Phase], scenario: Scenario) -> Plan:
    seconds = computing = sent = memory = 0.0
    for phase in phases:
        took, computed, bytes_sent = _phase(phase, scenario)
        seconds, computing, sent = seconds + took, computing + computed, sent + bytes_sent
        memory = max(memory, _memory(phase, scenario))
    kind = scenario.hardware
    return Plan(
        method=method,
        devices=scenario.devices,
        gb_per_device=memory / 1e9,
        fits=memory < 0.95 * kind.gb * 1e9,
        days=seconds / DAY_S,
        busy=computing / seconds,
        node_terabytes=sent / 1e12,
        dollars=scenario.devices * seconds / 3600 * kind.dollars_per_hour,
    )


def _phase(phase: Phase, scenario: Scenario) -> tuple[float, float, float]:
    """Return seconds, seconds that all devices would compute for, and bytes sent by each node over its link."""
    kind, members = scenario.hardware, scenario.devices // phase.groups
    batch = scenario.batch_tokens / phase.groups
    working = min(members, max(int(batch // scenario.length), 1))
    speed = kind.tflops * 1e12 * kind.efficiency
    compute = batch * phase.flops / (working * speed)
    traffic = (
        8.0 * phase.trained * (members - 1) / members
    )  # there and back in float32, or two gathers and one reduction
    if phase.sharded:
        traffic += 2 * FROZEN_BYTES * phase.frozen * (members - 1) / members
    leaves_node = members > kind.per_node
    transfer = traffic / (kind.linked_gb_per_s * 1e9)
    if leaves_node:
        transfer = max(transfer, traffic / _link(scenario))
    hidden = compute if phase.sharded else compute * 2 / 3
    step = compute + max(transfer - hidden, 0.0)
    steps = phase.tokens / (batch * phase.groups)
    sent = steps * traffic if leaves_node else 0.0
    seconds = steps * step
    if phase.rounds_of is not None:
        exchanged = 8.0 * phase.trained * (phase.groups - 1) / phase.groups
        is_between_nodes = scenario.devices > kind.per_node
        bandwidth = _link(scenario) if is_between_nodes else kind.linked_gb_per_s * 1e9
        seconds += steps / phase.rounds_of * exchanged / bandwidth
        sent += steps / phase.rounds_of * exchanged if is_between_nodes else 0.0
    return seconds, phase.tokens * phase.flops / (scenario.devices * speed), sent


def _memory(phase: Phase, scenario: Scenario) -> float:
    """Return the bytes on each device."""
    shape, members = scenario.shape, scenario.devices // phase.groups
    activations = ACTIVATION_BYTES * scenario.length * shape.layers * (4 * shape.hidden + shape.feed_forward)
    held = STATE_BYTES * phase.trained + FROZEN_BYTES * phase.frozen
    if not phase.sharded:
        return held + activations
    gathered = 2 * 2 * (phase.trained + phase.frozen) / shape.layers  # a layer in use and the next one, in bfloat16
    return held / members + gathered + activations


def _link(scenario: Scenario) -> float:
    """Return the bandwidth of a node's link in bytes per second."""
    return scenario.link_gbit / 8 * 1e9


# --- the methods as phases ---


def _attention_flops(scenario: Scenario) -> float:
    return 6.0 * scenario.length * scenario.shape.hidden * scenario.shape.layers


def _dense_flops(scenario: Scenario) -> float:
    return 6.0 * scenario.shape.multiplied + _attention_flops(scenario)


def _dense(scenario: Scenario, share: float = 1.0, *, groups: int = 1, sharded: bool = True) -> Phase:
    tokens, trained = share * scenario.tokens, scenario.shape.parameters
    return Phase(tokens, groups, trained, flops=_dense_flops(scenario), sharded=sharded)


def _data_parallel(scenario: Scenario) -> list[Phase]:
    return [_dense(scenario, sharded=False)]


def _fsdp(scenario: Scenario) -> list[Phase]:
    return [_dense(scenario)]


def _diloco(scenario: Scenario) -> list[Phase]:
    shape = scenario.shape
    flops = _dense_flops(scenario)
    return [Phase(scenario.tokens, scenario.experts, shape.parameters, flops=flops, rounds_of=scenario.sync_every)]


def _btm(scenario: Scenario) -> list[Phase]:
    share = scenario.seed_share
    return [_dense(scenario, share), _dense(scenario, 1 - share, groups=scenario.experts)]


def _flexolmo(scenario: Scenario) -> list[Phase]:
    """The public model, then each owner's feed-forward networks beside the frozen public model."""
    shape, share = scenario.shape, scenario.seed_share
    both = shape.multiplied + shape.in_feed_forwards
    flops = 4.0 * both + 2.0 * shape.in_feed_forwards + _attention_flops(scenario)
    tokens, trained = (1 - share) * scenario.tokens, shape.in_feed_forwards
    owners = Phase(tokens, scenario.experts, trained, frozen=shape.parameters, flops=flops)
    return [_dense(scenario, share), owners]


def _before_finetuning(scenario: Scenario) -> list[Phase]:
    share = 1 - scenario.seed_share - scenario.finetune_share
    return [_dense(scenario, scenario.seed_share), _dense(scenario, share, groups=scenario.experts)]


def _btx(scenario: Scenario) -> list[Phase]:
    """Branch-Train-Merge, then the mixture of the experts' feed-forward networks, all of it trained."""
    shape = scenario.shape
    active = shape.multiplied + (scenario.top_k - 1) * shape.in_feed_forwards
    whole = shape.parameters + (scenario.experts - 1) * shape.in_feed_forwards
    tokens, flops = scenario.finetune_share * scenario.tokens, 6.0 * active + _attention_flops(scenario)
    return [*_before_finetuning(scenario), Phase(tokens, 1, whole, flops=flops)]


def _bts(scenario: Scenario) -> list[Phase]:
    """Branch-Train-Merge, then stitches between the seed and all experts, which stay frozen.

    Half of the experts' layers lie behind the first stitch, so that gradients pass through them.
    """
    shape, members = scenario.shape, scenario.experts + 1
    forward = members * (2.0 * shape.multiplied + _attention_flops(scenario) / 3)
    backward = (1 + scenario.experts / 2) * (2.0 * shape.multiplied + _attention_flops(scenario) * 2 / 3)
    tokens = scenario.finetune_share * scenario.tokens
    stitches = (
        4.0 * (2 * scenario.experts + 1) * shape.hidden**2
    )  # four, each with projections and gates of all members
    return [
        *_before_finetuning(scenario),
        Phase(tokens, 1, stitches, frozen=members * shape.parameters, flops=forward + backward),
    ]


METHODS: Mapping[str, Callable[[Scenario], list[Phase]]] = {
    "data parallel": _data_parallel,
    "fsdp": _fsdp,
    "diloco": _diloco,
    "branch-train-merge": _btm,
    "flexolmo": _flexolmo,
    "branch-train-mix": _btx,
    "branch-train-stitch": _bts,
}
