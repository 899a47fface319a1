"""The sections of the project file `expertctl.yaml` and their settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Annotated, Any, Literal, TypeVar, get_args

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
from ..errors import UserError, did_you_mean
from .problems import sentence_about

Model = TypeVar("Model", bound=BaseModel)

DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
"""A share that leaves something to others."""
# Tags restrict errors to the variant in use; in an error location, a name in parentheses is a tag, not a key.
_BY_KIND = Discriminator(lambda value: "(shares)" if isinstance(value, Mapping) else "(word)")
Shares = Annotated[dict[str, float], Tag("(shares)")]


def _is_setting(value: Any) -> Any:
    """Validate a single number; values per layer or per module are checked later, when the layers are known."""
    return value if isinstance(value, list | dict) else _NUMBER.validate_python(value)


_NUMBER: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(allow_inf_nan=False)])
Settings = Annotated[dict[str, Annotated[Any, PlainValidator(_is_setting)]], Tag("(shares)")]


class Section(BaseModel):
    """Base of the project file's sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("input should not be true or false")
        return value


class Stage(Section):
    """A part of a run in which every block is cut into shorter ones (Shortformer, arXiv:2012.15832, section 3)."""

    share: Part
    """Fraction of the run's steps."""
    sequence_length: Annotated[int, Field(ge=8)]
    """Tokens per block; `training.sequence_length` has to be a multiple."""


class Annealing(Section):
    """The last part of a run: chosen domains, and a learning rate that falls to 0 (arXiv:2407.21783, section 3.4.3)."""

    share: Part
    """Fraction of the run's steps."""
    domains: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Domains that blocks are drawn from, with weights; a list gives all the same weight."""

    @field_validator("domains", mode="before")
    @classmethod
    def _list_has_equal_weights(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        names = [str(name) for name in value]
        if len(set(names)) < len(names):
            raise ValueError("a domain is named twice; give it a weight instead")
        return dict.fromkeys(names, 1.0)


class TrainingConfig(Section):
    """Training settings of one model. Experts and seed may override any field."""

    tokens: Positive = 150_000
    """Training budget of one run, in tokens."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    """Tokens per block."""
    batch_size: Positive = 8
    """Blocks per forward pass."""
    accumulation: Positive = 1
    """Forward passes per optimiser step."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate."""
    final_learning_rate: Share = 0.1
    """Learning rate at the end of the schedule, as a fraction of the peak."""
    schedule: Literal["linear", "cosine", "constant", "wsd", "restarts"] = "linear"
    """Learning rate after the warm-up: it decays (`linear`, `cosine`), stays (`constant`), stays and decays at the end (`wsd`), or
    decays several times from the peak (`restarts`)."""
    decay: Share = 0.2
    """`wsd`: fraction of the full schedule, at its end, over which the learning rate falls linearly."""
    cycles: Positive = 4
    """`restarts`: number of cosine decays in the full schedule."""
    warmup: Share = 0.08
    """Warm-up: fraction of the full schedule over which the learning rate rises from 0."""
    schedule_begin: Share | None = None
    """Position in the full schedule, from 0 to 1, where the run starts. None: where the seed's run ended, else 0."""
    schedule_end: Share = 1.0
    """Position in the full schedule where the run ends; below 1 for a seed that experts continue."""
    average: Literal["none", "last", "ema"] = "none"
    """What the artefact gets: the last weights, the mean of several from the last steps, or their moving average."""
    average_points: Positive = 5
    """`last`: number of states of the weights in the mean."""
    average_every: Positive = 10
    """`last`: steps between them; the last one is at the end of the run."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """`ema`: share that the average keeps at a step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay, applied to matrices only."""
    objective: str = "next_token"
    """What the loss of a batch is; `expertctl plugins` lists the objectives."""
    objective_options: dict[str, Any] = {}
    """Options of the objective."""
    optimiser: str = "adamw"
    """Optimiser; `expertctl plugins` lists them."""
    optimiser_options: dict[str, Any] = {}
    """Options of the optimiser."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW: decay rates of the two moments."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW: term added to the denominator."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Maximum gradient norm; null disables clipping."""
    inherit_optimiser: bool = True
    """Start from the seed's optimiser state, if the seed has one, as the released code of Branch-Train-Merge does."""
    precision: Literal["auto", "float32", "bfloat16", "pure_bfloat16"] = "auto"
    """`bfloat16`: passes in bfloat16, weights and optimiser in float32. `pure_bfloat16`: all in bfloat16, in half the memory.
    `auto`: `bfloat16` on a GPU that supports it, otherwise `float32`."""
    activation_checkpointing: bool | None = None
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time. None:
    with trainers whose memory is otherwise mostly activations, such as `lora`, where the model can."""
    chunked_loss: bool | None = None
    """Compute the loss some tokens at a time, so that all logits are never in memory. None: where they take over 256 MiB,
    and with the same trainers."""
    separate_documents: bool = False
    """Tokens attend only to their own document, whose positions begin at 0, and not to others in the same block."""
    pack_conversations: bool = False
    """Put several conversations into a block where they fit, each with positions and attention of its own. False: a block
    holds one conversation, or a piece of one."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Kernel of attention, by transformers' names. `auto`: transformers' choice, which is torch's SDPA where the model has it."""
    compile: bool = False
    """Compile the model with torch.compile: slower start-up, faster steps."""
    device: str = "auto"
    """Device of the training process: `auto`, `cpu`, `cuda`, `cuda:1` ..."""
    threads: Positive = 1
    """CPU threads of the training process; changing it may change the last bits of the result."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of the data order, and of the initial weights of a seed pretrained from scratch."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: Positive | None = None
    """Steps between validation passes. None: four passes per run."""
    validation_blocks: Positive = 32
    """Blocks of each domain per validation pass."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between checkpoints."""
    background_checkpoints: bool = False
    """Copy the state to the CPU's memory and write it while training goes on, instead of waiting for the disk."""
    sharded_checkpoints: bool = False
    """Each process of a sharded run (`fsdp`, `hsdp`) writes its rows of the state into files of its own, for models that are
    too large to be gathered. Such checkpoints resume on any number of processes and by any strategy, as others do."""
    skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Steps of any 100 that may be skipped because the loss or gradient is not finite; with one more the run stops."""
    spike_deviations: Annotated[float, Field(gt=0)] | None = None
    """Robust standard deviations by which the last five losses must rise above those before them to be a spike, which
    takes training back to a checkpoint and skips the text since. None: training is never taken back."""
    spike_window: Annotated[int, Field(ge=16)] = 128
    """Losses that recent ones are compared with to find a spike."""
    rollbacks: Annotated[int, Field(ge=0)] = 3
    """How often spikes may take training back; one more stops the run."""
    stages: tuple[Stage, ...] = ()
    """Parts of the run, from its start, in which blocks are cut into shorter ones; the rest has whole blocks."""
    annealing: Annealing | None = None
    """Last part of the run, on blocks of chosen domains, with a learning rate that falls to 0. None: there is none."""

    @model_validator(mode="after")
    def _span_goes_forward(self) -> TrainingConfig:
        if self.schedule_begin is not None and self.schedule_begin >= self.schedule_end:
            raise ValueError("schedule_begin must be smaller than schedule_end")
        return self

    @model_validator(mode="after")
    def _stages_leave_a_rest(self) -> TrainingConfig:
        total = sum(stage.share for stage in self.stages)
        if total >= 1 - 1e-9:
            raise ValueError(f"the shares of stages sum to {total:g}; leave a part of the run for sequence_length")
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.sequence_length

    @property
    def steps(self) -> int:
        """Number of optimiser steps within the token budget, at least one."""
        return max(self.tokens // self.tokens_per_step, 1)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens of all steps together."""
        return self.steps * self.tokens_per_step

    @property
    def lengths(self) -> tuple[tuple[range, int], ...]:
        """Steps of each stage, counted from 0, and its tokens per block; last those with whole blocks."""
        shares = accumulate(stage.share for stage in self.stages)
        ends = [0, *(round(share * self.steps) for share in shares), self.steps]
        lengths = [*(stage.sequence_length for stage in self.stages), self.sequence_length]
        return tuple(zip(map(range, ends, ends[1:]), lengths, strict=False))

    @property
    def part_begins(self) -> frozenset[int]:
        """Numbers of finished steps at which a run goes over to other blocks, so that losses before and after differ."""
        return frozenset(steps.start for steps, _ in self.lengths[1:]) | ({self.annealing_begin} - {self.steps})

    def length_at(self, step: int) -> int:
        """Return the tokens per block after `step` finished steps."""
        return next((length for steps, length in self.lengths if step in steps), self.sequence_length)

    @property
    def annealing_begin(self) -> int:
        """Number of steps before the annealing; all if there is none."""
        return self.steps - round(self.annealing.share * self.steps) if self.annealing is not None else self.steps


class DpConfig(Section):
    """Differential privacy of an expert; the unit of privacy is one block of its text (docs/privacy.md)."""

    epsilon: Annotated[float, Field(gt=0)]
    """Privacy budget epsilon of the whole run."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Probability that the epsilon bound fails; must be below 1 / number of blocks."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Maximum norm of each block's gradient; larger gradients are clipped."""
    accountant: Literal["rdp", "prv"] = "rdp"
    """Opacus accountant: `rdp` is closed-form; `prv` is numerical, takes seconds and needs a few percent less noise."""
    noise: Literal["secret", "seeded"] = "secret"
    """`secret`: from a key that is deleted when the run ends. `seeded`: from `training.seed`, for reproducible runs;
    gives no protection, since anyone who knows the seed can subtract the noise."""
    embedding_noise: Annotated[float, Field(gt=0)] | None = None
    """Noise multiplier of a private domain embedding, which spends part of epsilon. None: no embedding."""


class SeedConfig(Section):
    """The seed model: an imported checkpoint (`from`), or a model pretrained from a preset."""

    from_: str | None = Field(default=None, alias="from")
    """Hugging Face causal language model: a folder, a URL, or `hub:owner/name` with or without `@revision`."""
    bos: bool | None = None
    """Whether every document begins with the BOS token of an imported tokenizer. None: if the tokenizer puts it before a
    text itself."""
    rope_base: Annotated[float, Field(gt=1)] | None = None
    """RoPE base of an imported model in place of its own, such as 500000 to train it on longer texts."""
    positions: Positive | None = None
    """Number of positions of an imported model in place of its own; at least as many."""
    tokens: tuple[str, ...] = ()
    """Special tokens to add to the tokenizer, such as masks; of an imported model, the embedding grows if it has no row for
    them."""
    preset: str = "tiny"
    """Size of a seed pretrained from scratch."""
    family: Literal["olmo2", "llama", "qwen3", "bloom"] = "olmo2"
    """Architecture of a seed pretrained from scratch. `bloom` has linear attention biases (ALiBi) in place of positions."""
    tied: bool = False
    """Share input and output embedding of a seed pretrained from scratch."""
    domains: tuple[str, ...] | None = None
    """Domains to pretrain on. None: all."""
    training: TrainingConfig = TrainingConfig()
    licence: str | None = None


class DomainConfig(Section):
    """A named corpus: bundled, `train`, `valid` and `test` files, or one `path` to split."""

    bundled: str | None = None
    path: str | None = None
    """File or folder of documents, also by URL, split into training, validation and test."""
    train: str | None = None
    """File or folder of documents that models are trained on."""
    valid: str | None = None
    """File or folder of documents that weights, priors and other choices are fitted on."""
    test: str | None = None
    """File or folder of documents that models are evaluated on. None: half of the documents of `valid`."""
    valid_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the documents of `path` used for validation."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the documents of `path` used for evaluation."""
    text_field: str = "text"
    """Field or column with the text."""
    format: str | None = None
    """Format of the files: `chat` or `prompt_completion` for conversations. None: by their suffix."""
    chat_template: str | None = None
    """Chat template of conversations: a file, a name such as `chatml`, or `none` for a prompt followed by its completion.
    None: the tokenizer's own."""
    counts: Literal["assistant", "last", "all"] = "assistant"
    """Tokens of conversations that count towards the loss: the assistant's turns, its last one, or all."""
    order: str | None = None
    """Order in which training documents are packed into blocks (`in_context`). None: file order."""
    licence: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DomainConfig:
        sources = [name for name in ("bundled", "path", "train") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError("give exactly one of 'bundled', 'path' or 'train'")
        if (self.train is None) != (self.valid is None):
            raise ValueError("'train' and 'valid' go together; use 'path' to split one source")
        if self.test is not None and self.train is None:
            raise ValueError(
                "'test' goes with 'train' and 'valid'; a 'path' or bundled text has a test part of its own"
            )
        if self.format is None and {"chat_template", "counts"} & self.model_fields_set:
            raise ValueError(
                "'chat_template' and 'counts' are for conversations; set 'format' to chat or prompt_completion"
            )
        if self.format is not None and self.bundled is not None:
            raise ValueError("'format' is for files; bundled text has none")
        if self.valid_share + self.test_share >= 1:
            raise ValueError("valid_share and test_share must leave text to train on")
        return self


class LauncherConfig(Section):
    """Launcher of training runs. A bare name in the project file means no options."""

    name: str = "local"
    options: dict[str, Any] = {}
    """Options of the launcher."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, content: Any) -> Any:
        return {"name": content} if isinstance(content, str) else content

    def overlay(self, own: LauncherConfig | None) -> LauncherConfig:
        """Return `own`, above these options if it names this launcher or none; None: this launcher."""
        if own is None:
            return self
        if "name" in own.model_fields_set and own.name != self.name:
            return own
        return self.model_copy(update={"options": {**self.options, **own.options}})


class ExpertConfig(Section):
    """One expert: its domain, initial weights and trainable parameters."""

    domain: str
    from_: Annotated[Annotated[str, Tag("(word)")] | Shares, _BY_KIND] = Field(default="seed", alias="from")
    """Initial weights: `seed`, `auto` (average of experts, weighted by the new domain's posterior), or weights."""
    trains: str = "all"
    """Trainable parameters: a trainer, or a shell-style pattern of tensor names."""
    options: dict[str, Any] = {}
    """Options of the trainer."""
    training: TrainingConfig = TrainingConfig()
    dp: DpConfig | None = None
    """Train with differential privacy."""
    launcher: LauncherConfig | None = None
    """Launcher of this expert, or options above those of the project's launcher."""
    owner: str | None = None
    licence: str | None = None


class SearchConfig(Section):
    """Search for the weights of a merge."""

    strategy: Literal["coordinate", "cma"] = "coordinate"
    """`coordinate`: coordinate search, each weight up and down in turn; `cma`: CMA-ES."""
    trials: Positive = 40
    """Maximum number of merges to score, including the start."""
    layer_groups: Positive = 1
    """Number of weights per expert, spread evenly over the layers."""
    blocks: Positive = 32
    """Validation blocks of each domain for scoring a trial."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of `cma`."""


class MergeConfig(Section):
    """One generalist: merge method, experts, weights and method options."""

    method: str
    experts: tuple[str, ...] | None = None
    """Experts to merge. None: every finished expert."""
    weights: Annotated[Annotated[Literal["uniform", "posterior"], Tag("(word)")] | Settings, _BY_KIND] = "uniform"
    """`uniform`, `posterior`, or for each expert a number or numbers per layer and per module."""
    fit_on: tuple[str, ...] | None = None
    """Domains whose validation text priors and posterior weights are fitted on. None: the experts' domains."""
    options: dict[str, Any] = {}
    """Method options. Each may be a number, a gradient over the layers, `[{filter, value}]`, or one per expert."""
    tokenizer: str = "refuse"
    """Handling of different tokenizers: `refuse`, `base` (the seed's), `union`, or the name of an expert."""
    dtype: str | None = None
    """Dtype of the result. None: the seed's."""
    search: SearchConfig | None = None
    """Search for the weights with the lowest validation loss, starting from the posterior's weights."""

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
        """safetensors' name of the dtype."""
        return dtype_of_word(self.dtype) if self.dtype is not None else None


class ProjectConfig(Section):
    """The whole of `expertctl.yaml`."""

    seed: SeedConfig = SeedConfig()
    domains: dict[str, DomainConfig] = {}
    training: TrainingConfig = TrainingConfig()
    """Settings shared by seed and experts; each may override any field under its own `training`."""
    experts: dict[str, ExpertConfig] = {}
    merges: dict[str, MergeConfig] = {}
    launcher: LauncherConfig = LauncherConfig()
    tracking: dict[str, dict[str, Any]] = {}
    """Experiment trackers of all runs and merges, with their options."""

    @field_validator("tracking", mode="before")
    @classmethod
    def _name_alone_has_no_options(cls, content: Any) -> Any:
        if isinstance(content, dict):
            return {name: {} if options is None else options for name, options in content.items()}
        return content

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_set(cls, content: Any) -> Any:
        """Treat an empty section, such as `experts:` with only comments below it, as not set."""
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if value is not None}
        return content

    @model_validator(mode="after")
    def _domains_can_be_folders(self) -> ProjectConfig:
        for name in self.domains:
            if not DOMAIN_NAME.fullmatch(name):
                raise PydanticCustomError(
                    "domain_name",
                    "a domain cannot be called '{name}': use letters, digits, '-', '_' and '.', starting with a "
                    "letter or digit",
                    {"name": name, "at": ("domains", name)},
                )
        return self

    @model_validator(mode="after")
    def _domains_exist(self) -> ProjectConfig:
        named: list[tuple[str, tuple[str, ...]]] = [(domain, ("seed", "domains")) for domain in self.seed.domains or ()]
        named += [(expert.domain, ("experts", name, "domain")) for name, expert in self.experts.items()]
        for domain, where in named:
            if domain not in self.domains:
                hint = did_you_mean(domain, self.domains, f"; domains: {', '.join(self.domains) or 'none'}")
                # a custom error because a ValueError cannot carry the location for the line number
                context = {"domain": domain, "hint": hint, "at": where}
                raise PydanticCustomError("unknown_domain", "no domain '{domain}'{hint}", context)
        return self

    def training_of(self, own: TrainingConfig) -> TrainingConfig:
        """Return the project's training settings, overridden by the fields set in `own`."""
        return overlay(self.training, own)


def overlay(base: Model, own: Model) -> Model:
    """Return `base`, overridden by every field that is set explicitly in `own`."""
    overrides = {name: getattr(own, name) for name in own.model_fields_set}
    return validate_settings(
        type(base), {**base.model_dump(by_alias=True, exclude_unset=True), **overrides}, "training"
    )


def validate_settings(kind: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """Return settings from code or options as a section; raises `UserError` with `what`, key and nearest valid name."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{what}: {sentence_about(error, kind)}") from None
