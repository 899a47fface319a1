"""mergekit's YAML files as recipes: the same file means the same merge here.

mergekit's own defaults are filled in where ours are the papers' (`density: 1.0`, rescaling to the old sum of magnitudes);
what is not understood is refused by key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ...core.config.problems import first_problem
from ...core.config.settings import Section
from ...core.config.yaml_lines import parse_yaml
from ...core.errors import UserError, unknown_name
from .mergekit_models import NamedModels
from .mergekit_moe_file import read_mergekit_moe
from .recipe import WEIGHT, OutputSlice, Recipe, Scope, SourceSlice, TokenSource, whole_models

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


class _Token(Section):
    source: Any = None
    force: bool = False


class _Tokenizer(Section):
    source: Any = "union"
    tokens: dict[str, _Token] | None = None
    pad_to_multiple_of: int | None = None


class _File(Section):
    merge_method: str
    models: tuple[_Model, ...] | None = None
    slices: tuple[_Slice, ...] | None = None
    modules: dict[str, _Module] | None = None
    base_model: Any = None
    parameters: Parameters | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: _Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = None
    """mergekit takes and ignores it."""


@dataclass(frozen=True)
class _Method:
    """How one of mergekit's methods is said here."""

    base: Literal["input", "first", "seed", "optional"]
    """What becomes of base_model: an input like others, the first of two, the seed, or the seed if there is one."""
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ("int8_mask",)
    """Parameters that change nothing in the result."""
    rescales: bool = False
    """Whether `rescale: true` is possible: our `rescale: l1`."""


_TASK_VECTORS = {"normalize": False, "lambda": 1.0}
METHODS: dict[str, _Method] = {
    "linear": _Method("input", (WEIGHT,)),
    "slerp": _Method("first", ("t",)),
    "nuslerp": _Method("optional", (WEIGHT,)),
    "multislerp": _Method("optional", (WEIGHT,)),
    "karcher": _Method("input", dropped=(WEIGHT, "int8_mask")),
    "task_arithmetic": _Method("seed", (WEIGHT,), _TASK_VECTORS, ("int8_mask", "density", "rescale")),
    "ties": _Method("seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0, "normalize": True}),
    "dare_linear": _Method(
        "seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0, "rescale": "l1"}, rescales=True
    ),
    "dare_ties": _Method(
        "seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0, "rescale": "l1"}, rescales=True
    ),
    "della": _Method(
        "seed", (WEIGHT,), {"normalize": True, "lambda": 1.0, "density": 1.0, "rescale": "l1"}, rescales=True
    ),
    "della_linear": _Method(
        "seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0, "rescale": "l1"}, rescales=True
    ),
    "breadcrumbs": _Method("seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0}),
    "breadcrumbs_ties": _Method("seed", (WEIGHT,), {**_TASK_VECTORS, "density": 1.0}),
    "sce": _Method("seed", (), {"select_topk": 1.0}),
    "model_stock": _Method("seed"),
    "nearswap": _Method("seed", ("t",)),
    "arcee_fusion": _Method("seed"),
    "passthrough": _Method("input"),
}


def read_mergekit(path: Path) -> Recipe:
    """Return the recipe that a file of mergekit's, or of its mergekit-moe, describes.

    Models are folders, looked for from the current folder and from the file's. Raises `UserError` with file, line
    and key for what is not understood, not supported, or not there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    content, lines = parse_yaml(text, path)
    if isinstance(content, dict) and "experts" in content and "merge_method" not in content:
        return read_mergekit_moe(content, lines, path)
    try:
        file = _File.model_validate({} if content is None else content)
    except ValidationError as error:
        raise UserError(first_problem(error, path, lines, _File)) from None
    return _Reader(path, lines, file).recipe()


class _Reader:
    """Turns a checked file into a recipe."""

    def __init__(self, path: Path, lines: Mapping[Any, int], file: _File) -> None:
        self.path, self.file = path, file
        self.named = NamedModels(path, lines)
        if file.merge_method not in METHODS:
            raise UserError(
                f"{self.named.at('merge_method')}: "
                + str(
                    unknown_name(
                        "merge method", file.merge_method, METHODS, listed_as="of mergekit's there are"
                    )
                )
            )
        self.method = METHODS[file.merge_method]

    def recipe(self) -> Recipe:
        """Return the recipe; raises `UserError` for what has no counterpart here."""
        file = self.file
        module = self._module()
        base = self.named.model(file.base_model, ("base_model",)) if file.base_model is not None else None
        if self.method.base in ("seed", "first") and base is None and not self._slices_name_bases(module):
            raise UserError(f"{self.path}: merge method '{file.merge_method}' needs a base_model")
        slices = (
            self._slices(module, base)
            if module.slices is not None
            else self._whole(module.models or (), base)
        )
        scopes = [self._scope(module.parameters, ("modules",)), self._scope(file.parameters, ("parameters",))]
        if self.method.base == "optional" and base is not None:
            scopes.append({"task_vectors": True})
        scopes.append(self.method.defaults)
        tokenizer, tokens = self._tokenizer()
        seed = base if self.method.base in ("seed", "optional") else None
        models = (
            {base: self.named.models[base], **self.named.models}
            if base is not None and seed
            else self.named.models
        )
        return Recipe(
            method=file.merge_method,
            models=models,
            slices=slices,
            seed=seed,
            adapter_bases=self.named.adapter_bases,
            scopes=tuple(scopes),
            required=self.method.required,
            dtype=self.named.dtype(file.out_dtype, "out_dtype") or self.named.dtype(file.dtype, "dtype"),
            input_dtype=self.named.dtype(file.dtype, "dtype"),
            tokenizer=tokenizer,
            tokens=tokens,
            pad_to_multiple_of=file.tokenizer.pad_to_multiple_of if file.tokenizer is not None else None,
            chat_template=file.chat_template,
        )

    def _module(self) -> _Module:
        """Return what is merged as one module, whichever of the three forms the file has."""
        file = self.file
        given = [key for key in ("models", "slices", "modules") if getattr(file, key)]
        if len(given) != 1:
            raise UserError(
                f"{self.path}: give exactly one of 'models', 'slices' and 'modules'"
                + (f", not {' and '.join(given)}" if given else "")
            )
        if file.modules is None:
            return _Module(slices=file.slices, models=file.models)
        if len(file.modules) > 1:
            raise UserError(
                f"{self.named.at('modules')}: models of several modules ({', '.join(file.modules)}) are not supported; "
                "one module is"
            )
        (module,) = file.modules.values()
        if (module.slices is None) == (module.models is None):
            raise UserError(f"{self.named.at('modules')}: give exactly one of 'models' and 'slices'")
        return module

    def _slices_name_bases(self, module: _Module) -> bool:
        return module.slices is not None and all(part.base_model is not None for part in module.slices)

    def _whole(self, models: Sequence[_Model], base: str | None) -> tuple[OutputSlice, ...]:
        named = [
            (
                self.named.model(one.model, ("models", number, "model")),
                self._scope(one.parameters, ("models", number)),
            )
            for number, one in enumerate(models)
        ]
        self._require_different([name for name, _ in named], ("models",))
        if base is not None and base not in dict(named) and self.method.base in ("input", "first"):
            named.append((base, {}))
        ordered = self._ordered(named, base)
        return whole_models([name for name, _ in ordered], dict(ordered))

    def _slices(self, module: _Module, base: str | None) -> tuple[OutputSlice, ...]:
        found = []
        for number, part in enumerate(module.slices or ()):
            at: tuple[Any, ...] = ("slices", number)
            if part.residual_weight is not None:
                raise UserError(
                    f"{self.named.at(*at, 'residual_weight')}: 'residual_weight' is not supported"
                )
            own = (
                self.named.model(part.base_model, (*at, "base_model"))
                if part.base_model is not None
                else base
            )
            named = [
                (
                    self.named.model(source.model, (*at, "sources", index, "model")),
                    (source.layer_range, self._scope(source.parameters, (*at, "sources", index))),
                )
                for index, source in enumerate(part.sources)
            ]
            self._require_different([name for name, _ in named], at)
            ordered = self._ordered(named, own, keep_seed=True)
            parameters = self._scope(part.parameters, at)
            optional = self.method.base == "optional"
            found.append(
                OutputSlice(
                    tuple(SourceSlice(name, layers, parameters) for name, (layers, parameters) in ordered),
                    {**({"task_vectors": True} if own is not None and optional else {}), **parameters},
                    own if optional or self.method.base == "seed" else None,
                )
            )
        return tuple(found)

    def _ordered(
        self, named: Sequence[tuple[str, Any]], base: str | None, keep_seed: bool = False
    ) -> list[tuple[str, Any]]:
        """Return the sources in the order that our method takes them in, without the seed unless it is to stay."""
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
        """Return parameters as our method calls them."""
        found = {}
        for key, value in (parameters or {}).items():
            if key in self.method.dropped:
                continue
            if key == "rescale":
                value = self._rescale(value, at)
                if value is None:
                    continue
            found[key] = value
        return found

    def _rescale(self, value: Any, at: tuple[Any, ...]) -> str | None:
        if not isinstance(value, bool):
            raise UserError(f"{self.named.at(*at)}: 'rescale' is true or false here, for all tensors alike")
        if self.method.rescales:
            return "l1" if value else "none"
        if value:
            raise UserError(
                f"{self.named.at(*at)}: 'rescale: true' is not supported for '{self.file.merge_method}'"
            )
        return None

    def _tokenizer(self) -> tuple[str, dict[str, TokenSource]]:
        """Return our policy, and where single tokens' rows come from."""
        file = self.file
        if file.tokenizer is not None and file.tokenizer_source is not None:
            raise UserError(
                f"{self.named.at('tokenizer_source')}: give 'tokenizer' or 'tokenizer_source', not both"
            )
        source = file.tokenizer.source if file.tokenizer is not None else file.tokenizer_source
        tokens = (file.tokenizer.tokens if file.tokenizer is not None else None) or {}
        if source is None:
            return "refuse", {}
        policy = source if source in ("base", "union") else self.named.model(source, ("tokenizer_source",))
        found = {}
        for token, given in tokens.items():
            if given.source is None:
                continue
            if isinstance(given.source, dict) and "kind" in given.source:
                raise UserError(
                    f"{self.named.at('tokenizer', 'tokens', token)}: a source of kind '{given.source['kind']}' is not "
                    "supported; name a model"
                )
            found[token] = TokenSource(
                self.named.model(given.source, ("tokenizer", "tokens", token)), given.force
            )
        return policy, found
