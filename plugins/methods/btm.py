"""Branch-Train-Merge (arXiv:2208.03306): ensemble or weighted average of experts of one seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.files import link_or_copy
from ...core.artefacts.safetensors_io import Checkpoint, checkpoint_files
from ...core.hooks.ensembles import Mixer
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.manager import installed_plugins
from ...core.hooks.merging import BuiltModel, MergeInputs, MergeMethod, ModelBuilder, TensorMerge
from ...merge.dense.averages.linear import average

if TYPE_CHECKING:
    from ...merge.ensemble.model import EnsembleForCausalLM


def ensemble_options(values: Mapping[str, Any]) -> type:
    """Return the options of an ensemble: `mixer`, and those of the mixer that it names."""
    mixer = installed_plugins().offer(Mixer, str(values.get("mixer", "posterior")))
    bases = (mixer.options,) if mixer.options is not None else ()
    return make_dataclass(
        "EnsembleOptions", [("mixer", str, field(default=mixer.name, kw_only=True))], bases=bases, frozen=True
    )


def build_ensemble(inputs: MergeInputs, options: Any, folder: Path) -> BuiltModel:
    """Write an ensemble that links the experts' files and, if needed, the seed's."""
    from ...core.artefacts.files import read_json
    from ...merge.ensemble.model import EXPERTS_FOLDER, SEED_FOLDER, ensemble_config, write_config

    mixer, built = installed_plugins().offer(Mixer, options.mixer).fit(inputs, options)
    mixer.write(folder)
    (folder / EXPERTS_FOLDER).mkdir()
    for name, expert in inputs.experts.items():
        link_or_copy(expert / "model.safetensors", folder / EXPERTS_FOLDER / f"{name}.safetensors")
    if _needs_seed(inputs):
        (folder / SEED_FOLDER).mkdir()
        for file in _seed_files(inputs.seed):
            link_or_copy(file, folder / SEED_FOLDER / file.name)
    member = read_json(inputs.seed / "config.json")
    write_config(folder, ensemble_config(member, inputs.experts, options.mixer, mixer))
    return built


def _needs_seed(inputs: MergeInputs) -> bool:
    """Return whether any expert lacks a tensor of the seed."""
    names = set(Checkpoint.of_folder(inputs.seed))
    return any(names - set(Checkpoint([path / "model.safetensors"])) for path in inputs.experts.values())


def _seed_files(seed: Path) -> list[Path]:
    files = checkpoint_files(seed)
    index = seed / "model.safetensors.index.json"
    return [*files, index] if len(files) > 1 else files


def ensemble_classes() -> tuple[type, type]:
    """Return the classes that `AutoConfig` and `AutoModelForCausalLM` resolve for an ensemble."""
    from ...merge.ensemble.model import EnsembleConfig, EnsembleForCausalLM

    return EnsembleConfig, EnsembleForCausalLM


def without_members(model: EnsembleForCausalLM, experts: Sequence[str], gone: Collection[str]) -> EnsembleForCausalLM:
    """Return an ensemble without some experts."""
    return model.without(gone)


@hookimpl
def mixers() -> list[Mixer]:
    from ...merge.ensemble.posterior_mixing import PosteriorOptions, fit_posterior, read_posterior

    return [
        Mixer(
            "posterior",
            "domain posterior: prior, and likelihood of the text so far",
            fit_posterior,
            read_posterior,
            PosteriorOptions,
        )
    ]


@hookimpl
def merge_methods() -> list[MergeMethod]:
    return [
        TensorMerge(
            name="average",
            summary="weighted mean of the experts' tensors",
            merge=average,
            uses_seed=False,
            elementwise=True,
            arrays="any",
        ),
        ModelBuilder(
            name="ensemble",
            summary="ensemble: all experts, mixed per token by the domain posterior, by clusters or by another mixer",
            build=build_ensemble,
            kind="ensemble",
            options_for=ensemble_options,
            auto_classes=ensemble_classes,
            switch_off=without_members,
        ),
    ]
