"""The sections of the project file `expertctl.yaml` and their settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..artefacts.numeric import dtype_of_word
from ..errors import UserError, closest
from .problems import sentence_about

Model = TypeVar("Model", bound=BaseModel)

DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# Tags keep errors to the kind that was given; a part of a location in parentheses is one of them, no key.
_BY_KIND = Discriminator(lambda value: "(shares)" if isinstance(value, Mapping) else "(word)")
Shares = Annotated[dict[str, float], Tag("(shares)")]


def _is_setting(value: Any) -> Any:
    """Take a number, or numbers per layer and per module, which are checked where the layers are known."""
    if isinstance(value, list | dict):
        return value
    return _NUMBER.validate_python(value)


_NUMBER: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(allow_inf_nan=False)])
Settings = Annotated[dict[str, Annotated[Any, PlainValidator(_is_setting)]], Tag("(shares)")]


class Section(BaseModel):
    """A part of the project file: nothing unknown in it, nothing changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("input should not be true or false")
        return value


class TrainingConfig(Section):
    """How one model trains. Every field has a default that works; experts and seed may override any."""

    tokens: Positive = 150_000
    """Budget of one run, in tokens."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    """Tokens per block."""
    batch_size: Positive = 8
    """Blocks per forward pass."""
    accumulation: Positive = 1
    """Forward passes per optimiser step."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate."""
    final_learning_rate: Share = 0.1
    """Learning rate at the end of the schedule, as a share of the peak."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Share = 0.08
    """Share of the whole schedule over which the learning rate rises from 0."""
    schedule_begin: Share | None = None
    """Where in the whole schedule the run begins. Not set: where the seed's run ended, else 0."""
    schedule_end: Share = 1.0
    """Where in the whole schedule the run ends; a seed that experts continue ends before 1."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Applied to matrices only."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null switches clipping off."""
    inherit_optimiser: bool = True
    """Start from the seed's optimiser state when it has one (Branch-Train-Merge's code does)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 autocast on a GPU that has it, else float32."""
    compile: bool = False
    """Compile the model with torch.compile: slower start, faster steps."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` ..."""
    threads: Positive = 1
    """CPU threads of the training process. Changing it may change the last bits of the result."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of the data order (and of the initial weights of a seed made from scratch)."""
    log_every: Positive = 10
    """Steps between two lines of metrics.jsonl."""
    validate_every: Positive | None = None
    """Steps between two looks at validation text. Not set: four looks per run."""
    validation_blocks: Positive = 32
    """Blocks of each domain that such a look reads."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between two checkpoints."""

    @model_validator(mode="after")
    def _span_goes_forward(self) -> TrainingConfig:
        if self.schedule_begin is not None and self.schedule_begin >= self.schedule_end:
            raise ValueError("schedule_begin must be smaller than schedule_end")
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimiser steps that the budget pays for, at least one."""
        return max(self.tokens // self.tokens_per_step, 1)


class DpConfig(Section):
    """Differential privacy of an expert: how much may be known of any one block of its text (docs/privacy.md)."""

    epsilon: Annotated[float, Field(gt=0)]
    """Budget of the whole run."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Chance that the budget does not hold; must be below one in the number of blocks."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of one block's gradient; longer ones are cut to it."""
    accountant: Literal["rdp", "prv"] = "rdp"
    """Opacus's accountant: `rdp` in closed form, `prv` numerical, a few percent less noise after some seconds."""
    noise: Literal["secret", "seeded"] = "secret"
    """`secret`: from a key that nobody has when the run is over. `seeded`: from `training.seed`, to repeat a run;
    protects nobody, since whoever reads the seed can subtract the noise."""
    embedding_noise: Annotated[float, Field(gt=0)] | None = None
    """Noise multiplier of a private domain embedding, paid for out of epsilon. Not set: none is computed."""


class SeedConfig(Section):
    """The seed: an imported checkpoint (`from`), or one pretrained here from a preset."""

    from_: str | None = Field(default=None, alias="from")
    """Folder of a Hugging Face causal language model."""
    preset: str = "tiny"
    """Size of a seed made from scratch."""
    family: Literal["olmo2", "llama"] = "olmo2"
    domains: tuple[str, ...] | None = None
    """Domains it is pretrained on. Not set: all."""
    training: TrainingConfig = TrainingConfig()
    licence: str | None = None


class DomainConfig(Section):
    """A named body of text: bundled, or `train` and `valid` files, or one `path` that is split here."""

    bundled: str | None = None
    path: str | None = None
    """File or folder whose documents are split into train and valid."""
    train: str | None = None
    valid: str | None = None
    valid_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the documents that `path` gives to validation."""
    text_field: str = "text"
    """Field or column that holds the text."""
    order: str | None = None
    """Order in which training documents are packed into blocks (`in_context`). Not set: that of the files."""
    licence: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DomainConfig:
        given = [name for name in ("bundled", "path", "train") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of 'bundled', 'path' or 'train'")
        if (self.train is None) != (self.valid is None):
            raise ValueError("'train' and 'valid' go together; 'path' splits one source by itself")
        return self


class ExpertConfig(Section):
    """One expert: where it starts, what of it trains, on which domain."""

    domain: str
    from_: Annotated[Annotated[str, Tag("(word)")] | Shares, _BY_KIND] = Field(default="seed", alias="from")
    """`seed`, `auto` (average of the experts weighted by the posterior of the new domain), or weights."""
    trains: str = "all"
    """A trainer, or a shell-style pattern of tensor names."""
    options: dict[str, Any] = {}
    """Options of the trainer."""
    training: TrainingConfig = TrainingConfig()
    dp: DpConfig | None = None
    """Train with differential privacy."""
    owner: str | None = None
    licence: str | None = None


class SearchConfig(Section):
    """How the weights of a merge are looked for."""

    strategy: Literal["coordinate", "cma"] = "coordinate"
    """`coordinate`: more and less of each weight in turn; `cma`: CMA-ES."""
    trials: Positive = 40
    """Merges that are scored at most, the start among them."""
    layer_groups: Positive = 1
    """Weights for each expert, spread evenly over the layers."""
    blocks: Positive = 32
    """Validation blocks of each domain that a trial is scored on."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of `cma`."""


class MergeConfig(Section):
    """One generalist: method, experts, weights, and the method's own options."""

    method: str
    experts: tuple[str, ...] | None = None
    """Not set: every finished expert."""
    weights: Annotated[Annotated[Literal["uniform", "posterior"], Tag("(word)")] | Settings, _BY_KIND] = (
        "uniform"
    )
    """For each expert a number, or numbers per layer and per module."""
    fit_on: tuple[str, ...] | None = None
    """Domains whose validation text priors and posterior weights are fitted on. Not set: the experts' own."""
    options: dict[str, Any] = {}
    """The method's. Each may be a number, a gradient over the layers, `[{filter, value}]`, or one for each expert."""
    tokenizer: str = "refuse"
    """Where tokenizers differ: `refuse`, `base` (the seed's), `union`, or the name of an expert."""
    dtype: str | None = None
    """Of the result. Not set: the seed's."""
    search: SearchConfig | None = None
    """Look for the weights that predict validation text best, from the posterior's on."""

    @field_validator("dtype")
    @classmethod
    def _is_a_dtype(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                dtype_of_word(value)
            except UserError as error:
                raise ValueError(str(error)) from None
        return value

    @property
    def stored_dtype(self) -> str | None:
        """The dtype as safetensors spells it."""
        return dtype_of_word(self.dtype) if self.dtype is not None else None


class ProjectConfig(Section):
    """All of `expertctl.yaml`."""

    seed: SeedConfig = SeedConfig()
    domains: dict[str, DomainConfig] = {}
    training: TrainingConfig = TrainingConfig()
    """What seed and experts share; each may override any field under its own `training`."""
    experts: dict[str, ExpertConfig] = {}
    merges: dict[str, MergeConfig] = {}
    launcher: str = "local"

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_set(cls, content: Any) -> Any:
        """Take `experts:` with only comments below it as not set."""
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if value is not None}
        return content

    @model_validator(mode="after")
    def _domains_can_be_folders(self) -> ProjectConfig:
        for name in self.domains:
            if not DOMAIN_NAME.fullmatch(name):
                raise PydanticCustomError(
                    "domain_name",
                    "a domain cannot be called '{name}': use letters, digits, '-', '_' and '.', beginning with a "
                    "letter or digit",
                    {"name": name, "at": ("domains", name)},
                )
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> ProjectConfig:
        for domain in self.seed.domains or ():
            self._require_domain(domain, "seed", "domains")
        for name, expert in self.experts.items():
            self._require_domain(expert.domain, "experts", name, "domain")
        return self

    def _require_domain(self, domain: str, *where: str) -> None:
        if domain not in self.domains:
            guess = closest(domain, self.domains)
            hint = (
                f" (did you mean '{guess}'?)" if guess else f"; domains: {', '.join(self.domains) or 'none'}"
            )
            # custom, since a ValueError could not carry the place that the line number is looked up by
            raise PydanticCustomError(
                "unknown_domain",
                "there is no domain '{domain}'{hint}",
                {"domain": domain, "hint": hint, "at": where},
            )

    def training_of(self, own: TrainingConfig) -> TrainingConfig:
        """Return the project's training settings with the fields that `own` sets laid over them."""
        return overlay(self.training, own)


def overlay(base: Model, own: Model) -> Model:
    """Return `base` with every field that was given to `own` explicitly."""
    given = {name: getattr(own, name) for name in own.model_fields_set}
    return checked(type(base), {**base.model_dump(by_alias=True, exclude_unset=True), **given}, "training")


def checked(kind: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """Return settings that were given in code or on a command line as a section of the project file.

    Raises `UserError` that names `what`, the key and the nearest valid name.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{what}: {sentence_about(error, kind)}") from None
