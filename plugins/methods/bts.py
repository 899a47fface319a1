"""Branch-Train-Stitch (arXiv:2502.00075): frozen experts beside the frozen seed, joined by layers that alone are trained.

Merge method `stitch` puts them side by side, so that the result is the seed to the bit of its logits; trainer `stitches`
(`tune NAME --from STITCHED --trains stitches`) trains what joins them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.merging import MergeInputs, MergeMethod
from ...core.hooks.text import TrainingText
from ...core.hooks.training import TrainablePart, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...merge.stitched.container import StitchedForCausalLM

SEED_SHARE = 0.55
USUAL_STITCHES = 4


@dataclass(frozen=True)
class StitchOptions:
    """Where models are joined, and how."""

    num_stitches: int | None = None
    """Stitch layers, at equal depths of the hub; the last leads into the hub, before it they alternate. Not set: 4, or one
    after each layer of a hub that has fewer."""
    projected: bool = False
    """Experts go on with what the hub took from them (the paper's equations); else with their own states (its prose)."""
    dropout: float = 0.0
    """Of the gates' logits, while the stitches train."""
    self_contained: bool = False
    """Hold copies (links, where the disk allows them) of all members, rather than refer to their folders."""


@dataclass(frozen=True)
class StitchTraining:
    """How stitches train."""

    seed_share: float = SEED_SHARE
    """Share of the blocks from domains that the seed was pretrained on; the other domains divide the rest."""


def build(inputs: MergeInputs, options: StitchOptions, folder: Path) -> None:
    """Write a stitched model of seed and experts that is the seed as yet; raises `UserError` for what cannot be joined."""
    from ...core.artefacts.files import read_json
    from ...merge.stitched.configuration import StitchedConfig
    from ...merge.stitched.container import HUB, new_stitches, write_config, write_stitches
    from ...merge.stitched.members import described
    from ...merge.stitched.points import hub_points, matched_points

    if HUB in inputs.experts:
        raise UserError(f"an expert cannot be called '{HUB}' here: that is the seed's part")
    members = [
        described(name, source, inputs.seed, folder, self_contained=options.self_contained)
        for name, source in {HUB: inputs.seed, **inputs.experts}.items()
    ]
    hub, *experts = members
    count = (
        options.num_stitches if options.num_stitches is not None else min(USUAL_STITCHES, hub["num_layers"])
    )
    points = hub_points(hub["num_layers"], count)
    for one in experts:
        matched_points(points, one["name"], one["num_layers"])
        if options.projected and one["width"] != hub["width"]:
            raise UserError(
                f"expert '{one['name']}' has width {one['width']} and the hub {hub['width']}, so that it cannot go on with "
                "projected states; leave out --option projected"
            )
    config = StitchedConfig(
        hub=read_json(inputs.seed / "config.json"),
        members=members,
        num_stitches=count,
        projected=options.projected,
        dropout=options.dropout,
    )
    write_stitches(folder, new_stitches(config))
    write_config(folder, config)


def prepare(model: PreTrainedModel, options: StitchTraining, text: TrainingText) -> TrainablePart:
    """Train the stitches of a stitched model, all else frozen; raises `UserError` for any other model."""
    from ...merge.stitched.container import StitchedForCausalLM

    if not isinstance(model, StitchedForCausalLM):
        raise UserError(
            "stitches are trained of a stitched model; name one with --from (merge --method stitch)"
        )
    model.requires_grad_(False)
    model.stitches.requires_grad_(True)
    return TrainablePart(
        model,
        dict(model.stitches.named_parameters(prefix="stitches")),
        finish=lambda folder: model.save_trained(folder, text.folder),
        shares=shares(tuple(text.domains), text.seed_domains, options.seed_share),
    )


def shares(domains: Sequence[str], seed_domains: Collection[str], seed_share: float) -> dict[str, float]:
    """Return how much of the blocks each domain gives: the seed's share together, the others the rest, in equal parts."""
    if not 0 <= seed_share <= 1:
        raise UserError(f"seed_share is {seed_share}; it is a share, 0 to 1")
    old = [name for name in domains if name in seed_domains]
    new = [name for name in domains if name not in seed_domains]
    if not old or not new:
        return {name: 1 / len(domains) for name in domains}
    return {name: seed_share / len(old) if name in old else (1 - seed_share) / len(new) for name in domains}


def without_experts(
    model: StitchedForCausalLM, experts: Sequence[str], gone: Collection[str]
) -> StitchedForCausalLM:
    """Return the model with no gate open to those who are gone."""
    model.drop(gone)
    return model


@hookimpl
def merge_methods() -> list[MergeMethod]:
    def classes() -> tuple[type, type]:
        from ...merge.stitched.configuration import StitchedConfig
        from ...merge.stitched.container import StitchedForCausalLM

        return StitchedConfig, StitchedForCausalLM

    return [
        MergeMethod(
            "stitch",
            "frozen experts beside the frozen seed, joined at a few depths by layers to be trained (Branch-Train-Stitch)",
            build=build,
            kind="stitched",
            options=StitchOptions,
            auto_classes=classes,
            switch_off=without_experts,
            takes_models=True,
        )
    ]


@hookimpl
def trainers() -> list[Trainer]:
    return [
        Trainer(
            "stitches",
            "the layers that join the members of a stitched model",
            prepare,
            StitchTraining,
            uses_text=True,
            makes="generalist",
        )
    ]
