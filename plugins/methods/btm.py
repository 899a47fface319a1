"""Branch-Train-Merge (arXiv:2208.03306): ensemble or weighted average of experts of one seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

from ...core.artefacts.files import link_or_copy, read_json
from ...core.artefacts.safetensors_io import INDEX_FILE, Checkpoint, new_file, torch_dtype
from ...core.hooks.ensembles import Mixer
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.manager import installed_plugins
from ...core.hooks.merging import BuiltModel, MergeInputs, MergeMethod, ModelBuilder, TensorMerge
from ...core.models.adapters.folder import ADAPTER_WEIGHTS, is_adapter
from ...core.models.adapters.lora import AdaptedTensors
from ...core.models.adapters.prompts import is_prompt, num_prompt_tokens, read_prompt
from ...core.models.loading import WEIGHTS_FILE, changed_tensors
from ...merge.dense.averages.linear import average


def ensemble_options(values: Mapping[str, Any]) -> type:
    """Return the options of an ensemble: `mixer`, and those of the mixer that it names."""
    mixer = installed_plugins().offer(Mixer, str(values.get("mixer", "posterior")))
    bases = (mixer.options,) if mixer.options is not None else ()
    return make_dataclass(
        "EnsembleOptions", [("mixer", str, field(default=mixer.name, kw_only=True))], bases=bases, frozen=True
    )


def build_ensemble(inputs: MergeInputs, options: Any, folder: Path) -> BuiltModel:
    """Write an ensemble that links the experts' files and, if needed, the seed's; adapters are applied to the seed's."""
    from ...merge.ensemble.model import EXPERTS_FOLDER, SEED_FOLDER, ensemble_config, write_config

    mixer, built = installed_plugins().offer(Mixer, options.mixer).fit(inputs, options)
    mixer.write(folder)
    (folder / EXPERTS_FOLDER).mkdir()
    seed = Checkpoint.of_folder(inputs.seed)
    for name, expert in inputs.experts.items():
        path = folder / EXPERTS_FOLDER / f"{name}.safetensors"
        if is_prompt(expert):
            read_prompt(expert)  # raises for a file of another kind
            link_or_copy(expert / ADAPTER_WEIGHTS, path)
        elif is_adapter(expert):
            _write_adapted(AdaptedTensors(seed, expert), path)
        else:
            link_or_copy(expert / WEIGHTS_FILE, path)
    if any(is_prompt(expert) or set(seed) - set(changed_tensors(expert, seed)) for expert in inputs.experts.values()):
        (folder / SEED_FOLDER).mkdir()
        index = [inputs.seed / INDEX_FILE] if len(seed.files) > 1 else []
        for file in (*seed.files, *index):
            link_or_copy(file, folder / SEED_FOLDER / file.name)
    member = read_json(inputs.seed / "config.json")
    prompt = max(map(num_prompt_tokens, inputs.experts.values()), default=0)
    write_config(folder, ensemble_config(member, inputs.experts, options.mixer, mixer, prompt))
    return built


def _write_adapted(tensors: AdaptedTensors, path: Path) -> None:
    """Write the tensors that an adapter changes, in the dtype of its base model, one in memory at a time."""
    names = sorted(tensors)
    with new_file(path, {name: (tensors.entries[name].dtype, tensors.entries[name].shape) for name in names}) as file:
        for name in names:
            file.add(name, tensors.read(name).to(torch_dtype(tensors.entries[name].dtype)))


def ensemble_classes() -> tuple[type, type]:
    """Return the classes that `AutoConfig` and `AutoModelForCausalLM` resolve for an ensemble."""
    from ...merge.ensemble.model import EnsembleConfig, EnsembleForCausalLM

    return EnsembleConfig, EnsembleForCausalLM


@hookimpl
def mixers() -> list[Mixer]:
    from ...merge.ensemble.posterior_mixing import PosteriorOptions, fit_posterior, read_posterior

    summary = "domain posterior: prior, and likelihood of the text so far"
    return [Mixer("posterior", summary, fit_posterior, read_posterior, PosteriorOptions)]


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
            switch_off=lambda model, experts, disabled: model.without(disabled),
            takes_prompts=True,
        ),
    ]
