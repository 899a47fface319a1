"""What to merge and how, wherever it was written down: a project's `merges`, the command line, a mergekit file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Setting = Any
"""A parameter as users write it: a number, a word, a list of numbers (a gradient over the layers), or a list of
`{filter: ..., value: ...}`; see `merge/recipes/parameters.py`."""
Scope = Mapping[str, Setting]
WEIGHT = "weight"
"""The parameter of a source that says how much it counts."""


@dataclass(frozen=True)
class SourceSlice:
    """Layers of one model that go into a slice of the output."""

    model: str
    """Name in `Recipe.models`."""
    layers: tuple[int, int] | None = None
    """First layer and the one after the last; None: all."""
    parameters: Scope = field(default_factory=dict)


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive layers of the output: as many as each of its sources gives."""

    sources: tuple[SourceSlice, ...]
    parameters: Scope = field(default_factory=dict)
    seed: str | None = None
    """The model that this slice's experts are compared with, where it is not the recipe's."""


@dataclass(frozen=True)
class TokenSource:
    """Where the embedding of one token comes from, and whether even models that have it take it from there."""

    model: str
    force: bool = False


@dataclass(frozen=True)
class Recipe:
    """One merge, resolved as far as that is possible without opening a file."""

    method: str
    models: Mapping[str, Path]
    """Name -> folder: a Hugging Face model, an artefact of ours, or a PEFT adapter of the seed."""
    slices: tuple[OutputSlice, ...]
    seed: str | None = None
    """Name of the model that the experts started from, if the merge has one."""
    adapter_bases: Mapping[str, Path] = field(default_factory=dict)
    """Folder of the model that an adapter changes, where that is not the seed."""
    scopes: tuple[Scope, ...] = ()
    """Parameters for all slices, the most particular first."""
    required: tuple[str, ...] = ()
    """Parameters that must be given for every tensor, because no default goes with this recipe."""
    dtype: str | None = None
    """Of the output, as safetensors spells it. None: that of the inputs."""
    input_dtype: str | None = None
    """What inputs are rounded to before anything is calculated, where a mergekit file says so."""
    tokenizer: str = "refuse"
    """What to do when tokenizers differ: `refuse`, `base`, `union`, or the name of a model."""
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """The models that are merged, in the order of their first appearance, without the seed."""
        names = [source.model for part in self.slices for source in part.sources]
        return tuple(dict.fromkeys(name for name in names if name != self.seed))


def whole_models(
    names: Sequence[str], parameters: Mapping[str, Scope] | None = None
) -> tuple[OutputSlice, ...]:
    """Return the one slice of a merge that takes all layers of all models."""
    given = parameters or {}
    return (OutputSlice(tuple(SourceSlice(name, parameters=given.get(name, {})) for name in names)),)


def recipe_as_json(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as a manifest keeps it: models by name, without where they lie."""
    content = asdict(recipe)
    content["models"] = list(recipe.models)
    content["adapter_bases"] = {name: folder.name for name, folder in recipe.adapter_bases.items()}
    plain: dict[str, Any] = json.loads(json.dumps(content))  # lists for tuples: as it is read back
    return plain


def recipe_from_json(content: Mapping[str, Any], models: Mapping[str, Path]) -> Recipe:
    """Return the recipe of a manifest with the folders that its models were found in."""
    slices = tuple(
        OutputSlice(
            sources=tuple(
                SourceSlice(one["model"], tuple(one["layers"]) if one["layers"] else None, one["parameters"])
                for one in part["sources"]
            ),
            parameters=part["parameters"],
            seed=part["seed"],
        )
        for part in content["slices"]
    )
    given = {
        **content,
        "models": {name: models[name] for name in content["models"]},
        "adapter_bases": {name: models[f"base of {name}"] for name in content["adapter_bases"]},
        "slices": slices,
        "scopes": tuple(content["scopes"]),
        "required": tuple(content.get("required", ())),
        "tokens": {token: TokenSource(**source) for token, source in content["tokens"].items()},
    }
    return Recipe(**given)
