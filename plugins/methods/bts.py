"""Branch-Train-Stitch (arXiv:2502.00075): frozen seed and experts, connected by trainable stitch layers.

Merge method `stitch` builds the model; its logits are initially bit-identical to the seed's. Trainer
`stitches` (`tune NAME --from STITCHED --trains stitches`) trains the stitch layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.merging import MergeInputs, MergeMethod, ModelBuilder
from ...core.hooks.option_checks import check_range
from ...core.hooks.training import TrainablePart, Trainer, TrainingContext

if TYPE_CHECKING:
    from ...merge.stitched.container import StitchedForCausalLM

DEFAULT_STITCHES = 4


@dataclass(frozen=True)
class StitchOptions:
    """Options of a stitched model."""

    num_stitches: int | None = None
    """Number of stitch layers, equally spaced in the hub; the last leads into the hub, the others alternate.
    Not set: 4, or the number of hub layers if that is smaller."""
    projected: bool = False
    """Experts continue from projected states (the paper's equations), not their own (the paper's text)."""
    dropout: float = 0.0
    """Dropout rate of the gate logits during training."""
    self_contained: bool = False
    """Store copies or links of all members instead of referencing their folders."""


@dataclass(frozen=True)
class StitchTraining:
    """Training options of stitch layers."""

    seed_share: float = 0.55
    """Fraction of the training blocks from domains of the seed's pretraining; the other domains share the rest equally."""

    def __post_init__(self) -> None:
        check_range("seed_share", self.seed_share, 0, 1)


def build(inputs: MergeInputs, options: StitchOptions, folder: Path) -> None:
    """Write an untrained stitched model; raises `UserError` for models that cannot be stitched."""
    from ...core.artefacts.files import read_json
    from ...merge.stitched.configuration import StitchedConfig, hub_points, matched_points
    from ...merge.stitched.container import HUB, new_stitches, write_stitched
    from ...merge.stitched.members import add_member

    if HUB in inputs.experts:
        raise UserError(f"an expert cannot be called '{HUB}' in a stitched model: that is the seed; rename its folder")
    members = [
        add_member(name, source, inputs.seed, folder, self_contained=options.self_contained)
        for name, source in {HUB: inputs.seed, **inputs.experts}.items()
    ]
    hub, *experts = members
    count = options.num_stitches if options.num_stitches is not None else min(DEFAULT_STITCHES, hub["num_layers"])
    points = hub_points(hub["num_layers"], count)
    for expert in experts:
        matched_points(points, expert["name"], expert["num_layers"])
        if options.projected and expert["width"] != hub["width"]:
            raise UserError(
                f"expert '{expert['name']}' has width {expert['width']} and the hub {hub['width']}, so it "
                "cannot continue from projected states; remove --option projected"
            )
    config = StitchedConfig(
        hub=read_json(inputs.seed / "config.json"),
        members=members,
        num_stitches=count,
        projected=options.projected,
        dropout=options.dropout,
    )
    write_stitched(folder, config, new_stitches(config))


class StitchedPart(TrainablePart):
    """The stitches of a stitched model."""

    used_in_a_pass = "same"  # nothing reads what the last stitch leads into the experts

    def __init__(self, model: StitchedForCausalLM, shares: Mapping[str, float]) -> None:
        super().__init__(model, dict(model.stitches.named_parameters(prefix="stitches")), shares=shares)
        self._model = model

    def write_model(self, folder: Path, base: Path) -> None:
        self._model.save_trained(folder, base)


def prepare(context: TrainingContext) -> TrainablePart:
    """Make only the stitches of a stitched model trainable; raises `UserError` for any other model."""
    from ...merge.stitched.container import StitchedForCausalLM

    model, text = context.model, context.text
    if not isinstance(model, StitchedForCausalLM):
        raise UserError(
            "trainer 'stitches' needs a stitched model; make one with merge --method stitch and name it with --from"
        )
    model.requires_grad_(False)
    model.stitches.requires_grad_(True)
    return StitchedPart(model, shares(tuple(text.domains), text.seed_domains, context.options.seed_share))


def shares(domains: Sequence[str], seed_domains: Collection[str], seed_share: float) -> dict[str, float]:
    """Return each domain's fraction of the blocks: `seed_share` for the seed's domains."""
    old = [name for name in domains if name in seed_domains]
    new = [name for name in domains if name not in seed_domains]
    if not old or not new:
        return {name: 1 / len(domains) for name in domains}
    return {name: seed_share / len(old) if name in old else (1 - seed_share) / len(new) for name in domains}


def stitched_classes() -> tuple[type, type]:
    """Return the classes that `AutoConfig` and `AutoModelForCausalLM` resolve for a stitched model."""
    from ...merge.stitched.configuration import StitchedConfig
    from ...merge.stitched.container import StitchedForCausalLM

    return StitchedConfig, StitchedForCausalLM


@hookimpl
def merge_methods() -> list[MergeMethod]:
    return [
        ModelBuilder(
            "stitch",
            "stitched model: frozen seed and experts, connected by trainable stitch layers (Branch-Train-Stitch)",
            build=build,
            kind="stitched",
            options=StitchOptions,
            auto_classes=stitched_classes,
            switch_off=lambda model, experts, disabled: model.without(disabled),
            takes_models=True,
        )
    ]


@hookimpl
def trainers() -> list[Trainer]:
    summary = "stitch layers of a stitched model; the members are frozen"
    return [Trainer("stitches", summary, prepare, StitchTraining, uses_text=True, makes="generalist")]
