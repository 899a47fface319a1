"""Reads mergekit configuration files as recipes with the same result as in mergekit.

mergekit's defaults apply where ours follow the papers (`density: 1.0`, rescaling to the original sum of magnitudes).
Unsupported keys raise an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ...core.config.problems import first_problem
from ...core.config.settings import Section
from ...core.config.yaml_lines import parse_yaml
from ...core.errors import UserError, did_you_mean, unknown_name
from ...core.hooks.manager import installed_plugins
from ...core.hooks.merging import MergeMethod
from ...core.text.chat_templates import require_chat_template
from .mergekit_models import NamedModels
from .mergekit_moe_file import read_mergekit_moe
from .mergekit_tokens import TokenSettings, read_token_sources
from .parameters import check_setting
from .places import placed
from .recipe import WEIGHT, OutputSlice, Recipe, Scope, SourceSlice, TokenSource

Parameters = dict[str, Any]


class _Model(Section):
    model: Any
    parameters: Parameters | None = None


class _Source(_Model):
    layer_range: tuple[int, int]


class _Slice(Section):
    sources: tuple[_Source, ...]
    base_model: Any = None
    residual_weight: float | None = None
    parameters: Parameters | None = None


class _Module(Section):
    slices: tuple[_Slice, ...] | None = None
    models: tuple[_Model, ...] | None = None
    parameters: Parameters | None = None


class _Tokenizer(Section):
    source: Any = "union"
    tokens: dict[str, TokenSettings] | None = None
    pad_to_multiple_of: int | None = None


class _File(_Module):
    merge_method: str
    modules: dict[str, _Module] | None = None
    base_model: Any = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: _Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = None
    """Name of the result in files of several documents; ignored in others, as in mergekit."""


@dataclass(frozen=True)
class _Method:
    """How a mergekit method maps to ours."""

    base: Literal["input", "first", "seed", "optional"]
    """Role of base_model: an ordinary input, the first of two inputs, the seed, or an optional seed."""
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ("int8_mask",)
    """Parameters without an effect on the result."""
    rescales: bool = False
    """Whether `rescale: true` is supported (our `rescale: l1`)."""


_TASK_VECTORS = {"normalize": False, "lambda": 1.0}
METHODS: dict[str, _Method] = {
    "linear": _Method("input", (WEIGHT,)),
    "slerp": _Method("first", ("t",)),
    "nuslerp": _Method("optional", (WEIGHT,)),
    "multislerp": _Method("optional", (WEIGHT,)),
    "karcher": _Method("input", dropped=(WEIGHT, "int8_mask")),
    "task_arithmetic": _Method("seed", (WEIGHT,), _TASK_VECTORS, ("int8_mask", "density", "rescale")),
    "ties": _Method("seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0, "normalize": True}),
    "dare_linear": _Method("seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0, "rescale": "l1"}, rescales=True),
    "dare_ties": _Method("seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0, "rescale": "l1"}, rescales=True),
    "della": _Method(
        "seed", (WEIGHT,), {"normalize": True, "lambda": 1.0, "density": 1.0, "rescale": "l1"}, rescales=True
    ),
    "della_linear": _Method("seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0, "rescale": "l1"}, rescales=True),
    "breadcrumbs": _Method("seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0}),
    "breadcrumbs_ties": _Method("seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0}),
    "sce": _Method("seed", (), {"select_topk": 1.0}),
    "model_stock": _Method("seed"),
    "nearswap": _Method("seed", ("t",)),
    "arcee_fusion": _Method("seed"),
    "ram": _Method("seed", dropped=(WEIGHT, "int8_mask")),
    "ramplus_tl": _Method("seed", dropped=(WEIGHT, "int8_mask")),
    "passthrough": _Method("input"),
}


_PARAMETERS = (
    *(WEIGHT, "density", "epsilon", "gamma", "lambda", "normalize", "rescale", "select_topk", "t", "int8_mask"),
    *("r", "alpha"),
)
"""Parameters of any method, which files often give for all of them."""


def read_mergekit(path: Path) -> Recipe:
    """Return the recipe of a mergekit or mergekit-moe configuration file.

    Models are folders, relative to the current folder or to the folder of the file. Raises `UserError` with file, line
    and key for unknown keys, unsupported settings and missing models.
    """
    content, lines = parse_yaml(path)
    return recipe_of(content, NamedModels(path, lines))


def recipe_of(content: Any, named: NamedModels) -> Recipe:
    """Return the recipe of a parsed document, whose models are resolved by `named`; raises `UserError` likewise."""
    if isinstance(content, dict) and "experts" in content and "merge_method" not in content:
        return read_mergekit_moe(content, named)
    try:
        file = _File.model_validate(content)
    except ValidationError as error:
        raise UserError(first_problem(error, named.path, named.lines, _File)) from None
    return _Reader(named, file).recipe()


class _Reader:
    """Converts a validated file into a recipe."""

    def __init__(self, named: NamedModels, file: _File) -> None:
        self.named, self.file = named, file
        if file.merge_method not in METHODS:
            raise UserError(
                f"{self.named.at('merge_method')}: "
                + str(unknown_name("merge method", file.merge_method, METHODS, listed_as="of mergekit's there are"))
            )
        self.method = METHODS[file.merge_method]
        options = installed_plugins().offer(MergeMethod, file.merge_method).options
        self.known = {WEIGHT, *(option.name.rstrip("_") for option in (fields(options) if options is not None else ()))}
        self.notes: list[str] = []
        self.root: tuple[Any, ...] = ("modules", *file.modules) if file.modules is not None else ()
        """Keys above `models` and `slices`."""

    def recipe(self) -> Recipe:
        file = self.file
        module = self._module()
        base = self.named.model(file.base_model, ("base_model",)) if file.base_model is not None else None
        all_slices_have_bases = module.slices and all(
            output_slice.base_model is not None for output_slice in module.slices
        )
        if self.method.base in ("seed", "first") and base is None and not all_slices_have_bases:
            raise UserError(f"{self.named.at('merge_method')}: merge method '{file.merge_method}' needs a base_model")
        slices = (
            tuple(self._slice(part, base, (*self.root, "slices", number)) for number, part in enumerate(module.slices))
            if module.slices is not None
            else self._whole(module.models or (), base)
        )
        scopes = [self._scope(module.parameters, self.root), self._scope(file.parameters, ())]
        if self.method.base == "optional" and base is not None:
            scopes.append({"task_vectors": True})
        scopes.append(self.method.defaults)
        tokenizer, tokens = self._tokenizer()
        if file.chat_template is not None:
            with placed(self.named.at("chat_template")):
                require_chat_template(file.chat_template)
        seed = base if self.method.base in ("seed", "optional") else None
        models = {seed: self.named.models[seed], **self.named.models} if seed is not None else self.named.models
        return Recipe(
            method=file.merge_method,
            models=models,
            slices=slices,
            seed=seed,
            adapter_bases=self.named.adapter_bases,
            references=self.named.references,
            scopes=tuple(scopes),
            required=self.method.required,
            dtype=self.named.dtype(file.out_dtype, "out_dtype") or self.named.dtype(file.dtype, "dtype"),
            input_dtype=self.named.dtype(file.dtype, "dtype"),
            tokenizer=tokenizer,
            tokens=tokens,
            pad_to_multiple_of=file.tokenizer.pad_to_multiple_of if file.tokenizer is not None else None,
            chat_template=file.chat_template,
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _module(self) -> _Module:
        """Return the single module of the file, from `models`, `slices` or `modules`."""
        file = self.file
        keys = [key for key in ("models", "slices", "modules") if getattr(file, key)]
        if len(keys) != 1:
            raise UserError(
                f"{self.named.at(keys[-1] if keys else 'merge_method')}: give exactly one of 'models', 'slices' and 'modules'"
                + (f", not {' and '.join(keys)}" if keys else "")
            )
        if file.modules is None:
            return _Module(slices=file.slices, models=file.models)
        if len(file.modules) > 1:
            raise UserError(
                f"{self.named.at('modules')}: several modules ({', '.join(file.modules)}) are not supported; give one module"
            )
        (module,) = file.modules.values()
        if (module.slices is None) == (module.models is None):
            raise UserError(f"{self.named.at('modules')}: give exactly one of 'models' and 'slices'")
        return module

    def _whole(self, models: Sequence[_Model], base: str | None) -> tuple[OutputSlice, ...]:
        at = (*self.root, "models")
        named = []
        for number, model in enumerate(models):
            place = (*at, number)
            name = self.named.model(model.model, (*place, "model"))
            parameters = self._scope(model.parameters, place)
            named.append((name, SourceSlice(name, parameters=parameters, place=self.named.at(*place, "model"))))
        self._require_different([name for name, _ in named], at)
        if base is not None and base not in dict(named) and self.method.base in ("input", "first"):
            named.append((base, SourceSlice(base, place=self.named.at("base_model"))))
        sources = tuple(source for _, source in self._ordered(named, base))
        return (OutputSlice(sources, place=self.named.at(*at)),)

    def _slice(self, file_slice: _Slice, base: str | None, at: tuple[Any, ...]) -> OutputSlice:
        if file_slice.residual_weight is not None:
            raise UserError(f"{self.named.at(*at, 'residual_weight')}: 'residual_weight' is not supported")
        if file_slice.base_model is not None:
            base = self.named.model(file_slice.base_model, (*at, "base_model"))
        named = []
        for index, source in enumerate(file_slice.sources):
            place = (*at, "sources", index)
            name = self.named.model(source.model, (*place, "model"))
            parameters = self._scope(source.parameters, place)
            named.append(
                (name, SourceSlice(name, source.layer_range, parameters, self.named.at(*place, "layer_range")))
            )
        self._require_different([name for name, _ in named], at)
        sources = tuple(source for _, source in self._ordered(named, base, keep_seed=True))
        parameters = self._scope(file_slice.parameters, at)
        if base is not None and self.method.base == "optional":
            parameters = {"task_vectors": True, **parameters}
        seed = base if self.method.base in ("optional", "seed") else None
        return OutputSlice(sources, parameters, seed, self.named.at(*at))

    def _ordered(
        self, named: Sequence[tuple[str, Any]], base: str | None, keep_seed: bool = False
    ) -> list[tuple[str, Any]]:
        """Return the sources in the order that our method expects; the seed is dropped unless `keep_seed`."""
        if base is None or self.method.base == "input":
            return list(named)
        if self.method.base == "first":
            return sorted(named, key=lambda pair: pair[0] != base)
        others = [pair for pair in named if pair[0] != base]
        return [*others, *(pair for pair in named if pair[0] == base)] if keep_seed else others

    def _require_different(self, names: Sequence[str], at: tuple[Any, ...]) -> None:
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{self.named.at(*at)}: model '{name}' is given twice")

    def _scope(self, parameters: Parameters | None, at: tuple[Any, ...]) -> Scope:
        """Return the `parameters` below a key under the names of our method."""
        scope = {}
        for key, value in (parameters or {}).items():
            place = self.named.at(*at, "parameters", key)
            if key in self.method.dropped:
                continue
            if key not in self.known and key != "rescale":
                self._note_unknown(key, place)
                continue
            if key != "rescale":
                with placed(place):
                    check_setting(key, value)
                scope[key] = value
            elif not isinstance(value, bool):
                raise UserError(f"{place}: 'rescale' must be true or false, for all tensors")
            elif self.method.rescales:
                scope[key] = "l1" if value else "none"
            elif value:
                raise UserError(f"{place}: 'rescale: true' is not supported for '{self.file.merge_method}'")
        return scope

    def _note_unknown(self, key: str, place: str) -> None:
        """Note a parameter that the method does not have, as such files are common; raises `UserError` for a typo."""
        problem = f"{place}: '{self.file.merge_method}' has no parameter '{key}'"
        if key not in _PARAMETERS and (hint := did_you_mean(key, self.known)):
            raise UserError(f"{problem}{hint}")
        self.notes.append(f"{problem}; it is ignored")

    def _tokenizer(self) -> tuple[str, dict[str, TokenSource]]:
        """Return the tokenizer policy and the sources of single tokens' rows."""
        settings, source = self.file.tokenizer, self.file.tokenizer_source
        if settings is not None and source is not None:
            raise UserError(f"{self.named.at('tokenizer_source')}: give 'tokenizer' or 'tokenizer_source', not both")
        source = settings.source if settings is not None else source
        if source is None:
            return "refuse", {}
        inputs = tuple(self.named.models)
        key = ("tokenizer", "source") if settings is not None else ("tokenizer_source",)
        policy = source if source in ("base", "union") else self.named.model(source, key)
        tokens = settings.tokens if settings is not None else None
        return policy, read_token_sources(tokens or {}, self.named, inputs)
