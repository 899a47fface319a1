"""The merge recipe, the common form of merges from `expertctl.yaml`, the command line and mergekit files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...core.manifests.records import parse_record

Setting = Any
"""A parameter in user syntax: a number, a string, a list of numbers (a gradient over layers), or a list of
`{filter: ..., value: ...}`; see `merge/recipes/parameters.py`."""
Scope = Mapping[str, Setting]
WEIGHT = "weight"
"""Name of the parameter for the weight of a source."""


@dataclass(frozen=True)
class SourceSlice:
    """Layers of one model that are an input of an output slice."""

    model: str
    """Name in `Recipe.models`."""
    layers: tuple[int, int] | None = None
    """Half-open range of layers; None: all layers."""
    parameters: Scope = field(default_factory=dict)
    place: str = field(default="", compare=False)
    """`FILE:LINE` of the file that the recipe was read from; no part of the merge."""


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive layers of the output, merged from the same number of layers of each source."""

    sources: tuple[SourceSlice, ...]
    parameters: Scope = field(default_factory=dict)
    seed: str | None = None
    """Name of the seed of this slice; None: the seed of the recipe."""
    place: str = field(default="", compare=False)
    """`FILE:LINE` of the file that the recipe was read from; no part of the merge."""


@dataclass(frozen=True)
class TokenSource:
    """Source of the embedding of one token; with `force`, also for models that have the token."""

    model: str | None
    """None: zeros."""
    force: bool = False
    token: str | int | None = None
    """Another token of the model, or its id, whose embedding is used; None: the same token."""
    place: str = field(default="", compare=False)
    """`FILE:LINE` of the file that the recipe was read from; no part of the merge."""


@dataclass(frozen=True)
class Recipe:
    """One merge, resolved as far as possible without opening model files."""

    method: str
    models: Mapping[str, Path]
    """Name -> folder of a Hugging Face model, an artefact, or a PEFT adapter of the seed."""
    slices: tuple[OutputSlice, ...]
    seed: str | None = None
    """Name of the seed in `models`; None: a merge without a seed."""
    adapter_bases: Mapping[str, Path] = field(default_factory=dict)
    """Adapter name -> folder of its base model, for adapters whose base model is not the seed."""
    scopes: tuple[Scope, ...] = ()
    """Parameters for all slices, in order of precedence."""
    required: tuple[str, ...] = ()
    """Parameters without a default, which must be set for every tensor."""
    dtype: str | None = None
    """Output dtype, by its safetensors name; None: dtype of the inputs."""
    input_dtype: str | None = None
    """Dtype to which inputs are rounded before merging (`dtype` of a mergekit file); None: no rounding."""
    tokenizer: str = "refuse"
    """Policy for different tokenizers: `refuse`, `base`, `union`, or the name of a model."""
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
    references: Mapping[str, str] = field(default_factory=dict)
    """Model name, or `base of NAME` for the base of an adapter -> its name on the hub with the commit
    (`owner/name@commit`), or its relative path, from which a repetition of the merge finds it."""
    notes: tuple[str, ...] = ()
    """Remarks on the file that the recipe was read from; no part of the merge."""

    @property
    def leading(self) -> str:
        """Name of the model that provides configuration and tokenizer: the seed, or the first model without a seed."""
        return self.seed or self.slices[0].sources[0].model

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the merged models without the seed, in order of first appearance."""
        names = [source.model for output_slice in self.slices for source in output_slice.sources]
        return tuple(dict.fromkeys(name for name in names if name != self.seed))


def whole_models(names: Sequence[str], parameters: Mapping[str, Scope] | None = None) -> tuple[OutputSlice, ...]:
    """Return the single slice of a merge of all layers of all models."""
    by_name = parameters or {}
    return (OutputSlice(tuple(SourceSlice(name, parameters=by_name.get(name, {})) for name in names)),)


def recipe_as_json(recipe: Recipe) -> dict[str, Any]:
    """Return the JSON form of a recipe for a manifest, with model names but no folders."""
    content = asdict(recipe)
    del content["notes"]
    output_slices = content["slices"]
    sources = [source for output_slice in output_slices for source in output_slice["sources"]]
    for placed in (*output_slices, *sources, *content["tokens"].values()):
        del placed["place"]
    content["models"] = list(recipe.models)
    content["adapter_bases"] = {name: folder.name for name, folder in recipe.adapter_bases.items()}
    return dict(json.loads(json.dumps(content)))  # tuples become lists, as after reading


def change_models(content: Mapping[str, Any], remove: Collection[str], add: Collection[str]) -> dict[str, Any]:
    """Return the JSON form of a recipe without the models `remove`, and with the whole models `add` in every slice."""
    added: list[dict[str, Any]] = [{"model": name, "layers": None, "parameters": {}} for name in add]
    slices = [
        {
            **output_slice,
            "sources": [source for source in output_slice["sources"] if source["model"] not in remove] + added,
        }
        for output_slice in content["slices"]
    ]
    models = [*(name for name in content["models"] if name not in remove), *add]
    references = {
        name: reference
        for name, reference in content.get("references", {}).items()
        if name.removeprefix("base of ") in models
    }
    return {**content, "models": models, "slices": slices, "references": references}


def recipe_from_json(content: Mapping[str, Any], models: Mapping[str, Path]) -> Recipe:
    """Return the recipe of a manifest, with `models` as the folders of its models."""
    folders = {
        "models": {name: models[name] for name in content["models"]},
        "adapter_bases": {name: models[f"base of {name}"] for name in content["adapter_bases"]},
    }
    return parse_record(Recipe, {**content, **folders}, "the recipe")
