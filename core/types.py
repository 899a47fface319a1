"""What plugins offer and what passes between the stages: frozen dataclasses and the shapes of their functions.

This file and `hookspecs.py` are the surface that third-party plugins build on; everything else may move.
Tensor shapes use B = batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from .token_store import TokenBlocks


# --- corpora ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorpusFormat:
    """A kind of text file that can be read into documents."""

    name: str
    summary: str
    suffixes: tuple[str, ...]
    """Endings of the files it reads, with the leading dot, longest match first: `(".jsonl", ".jsonl.gz")`."""
    read: Callable[[Path, str], Iterator[str]]
    """`read(path, text_field)` yields the text of each document, in file order, without holding the file.

    Raises `UserError` with the file and, where there are lines, the line number.
    """
    read_values: Callable[[Path, str, str], Iterator[Document]] | None = None
    """`read_values(path, text_field, field)` yields the same documents with what another field says of them;
    None: documents of this format have no further fields."""


@dataclass(frozen=True)
class Document:
    """A text, and what a field of metadata says of it."""

    text: str
    value: str | None = None
    """None where no field was asked for."""


@dataclass(frozen=True)
class DocumentOrder:
    """An order in which a domain's documents are packed into blocks for training."""

    name: str
    summary: str
    order: Callable[[Sequence[str]], Sequence[int]]
    """`order(texts)` returns the numbers of all texts, each once, in their new order. `texts` lie on disk: each access
    reads one, and not all need fit into memory."""


@dataclass(frozen=True)
class DiscoveryInputs:
    """What domains can be found from. Only training text is seen."""

    documents: Callable[[], Iterator[Document]]
    """Reads all documents anew, one by one: they need not fit into memory."""
    sample: Callable[[], Sequence[str]]
    """Returns the beginnings of some documents, drawn by the random seed, in an order that means nothing."""
    clusters: int | None
    """How many domains are asked for; None: as many as there are."""
    random_seed: int
    root: Path
    """Of the workspace: where relative paths begin."""
    seed: Path
    """Folder of the seed, which may not have been made yet."""
    say: Callable[[str], None] = field(default=lambda line: None)


class FoundDomains(Protocol):
    """Domains that were found. N = documents, K = domains."""

    @property
    def labels(self) -> Sequence[str]:
        """What each domain is called within its set, such as `3` or `law`; K different ones."""
        ...

    def distances(self, documents: Sequence[Document]) -> NDArray[Any]:
        """Return how far documents are from the domains, (N, K); each goes to the nearest."""
        ...

    def top_words(self, domain: int) -> Sequence[str]:
        """Return words that tell a human what the domain is about, the best first."""
        ...

    def write(self, folder: Path) -> None:
        """Keep in a folder what is known of the domains."""
        ...


@dataclass(frozen=True)
class DomainDiscoverer:
    """A way to sort unlabelled text into domains."""

    name: str
    summary: str
    fit: Callable[[DiscoveryInputs, Any], FoundDomains]
    """`fit(inputs, options)`; raises `UserError` for text that is too little."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    read: Callable[[Path], FoundDomains] | None = None
    """`read(folder)` returns what was written there, so that documents are sorted in several processes; None: in one."""
    field: Callable[[Any], str] | None = None
    """`field(options)` names the field of metadata that documents are read with; None: text alone."""

    def __post_init__(self) -> None:
        _check_options(self.options, f"domain discoverer '{self.name}'")


# --- training --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainablePart:
    """What one training run moves: the module that computes, and the parameters that change."""

    module: nn.Module
    """Called as `module(input_ids=..., use_cache=False)`, gives an object with `.logits` of shape (B, T, V)."""
    parameters: Mapping[str, nn.Parameter]
    """Everything that is trained, by its name in the checkpoint."""
    auxiliary_loss: Callable[[], Tensor] | None = None
    """Called after each forward pass: what is added to its cross-entropy, shape ()."""
    auxiliary_per_example: bool = False
    """Whether the auxiliary loss is a mean over the batch of what depends on one example each, as training with
    differential privacy needs."""
    tensors: Callable[[], Mapping[str, Tensor]] | None = None
    """Returns the trained tensors by the names that the starting model has for them; None: they have these names."""
    beside: Callable[[], Mapping[str, Mapping[str, Tensor]]] | None = None
    """Returns further tensors of the artefact, by file and name, that the starting model has none of."""
    tell_domains: Callable[[Sequence[int]], None] | None = None
    """Told before each forward pass which domain of the run each row of the batch is of."""
    tell_step: Callable[[int], None] | None = None
    """Told before each optimiser step how many were done."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest of a generalist says besides: `method`, `kind`, `weights` ... What stands under `tuning` is
    laid over what it says of this training: `made`, names of experts that came to be in it; `began_as`, what they are copies of
    where they alone trained."""
    measures: Callable[[], Mapping[str, float]] | None = None
    """Returns what is worth logging of the last forward pass, beside its loss; called when a step is logged."""
    shares: Mapping[str, float] | None = None
    """How much of the blocks each domain of the run gives; None: all the same."""
    notes: Sequence[str] = ()
    """What whoever trains should know of it, a line each: shown when the run begins."""
    finish: Callable[[Path], None] | None = None
    """Writes the model's files into the folder of a generalist; None: it is saved as transformers saves it."""


class PrivateReleases(Protocol):
    """The only way to what a trainer may learn of private text before training; everything is paid for out of epsilon."""

    @property
    def releases_embedding(self) -> bool:
        """Whether the owner wants an embedding released (`dp.embedding_noise` is set)."""
        ...

    def embedding_mean(self, rows: Iterable[Tensor], clip: float) -> Tensor:
        """Return the mean of vectors (n,), one for each block of the text, each cut to norm `clip`, with noise."""
        ...


@dataclass(frozen=True)
class TrainingText:
    """The text of a run, as a trainer may read it before training begins."""

    domains: Mapping[str, TokenBlocks]
    """Training parts of the run's own domains."""
    other: Callable[[str], TokenBlocks]
    """Returns the training part of another domain of the project; raises `UserError` for one that there is not."""
    seed_domains: tuple[str, ...]
    """Domains of the project that the seed was pretrained on."""
    folder: Path
    """Of the model that training starts from."""
    private: PrivateReleases | None = None
    """Not None: the run is private, and nothing that depends on `domains` may be used unless it comes through this."""


@dataclass(frozen=True)
class Trainer:
    """Which part of a model trains, and how."""

    name: str
    summary: str
    prepare: Callable[..., TrainablePart]
    """`prepare(model, options)` freezes what stays and returns what moves; with `uses_text` it is called as
    `prepare(model, options, text)` with a `TrainingText`."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    uses_text: bool = False
    private_text: bool = False
    """With `uses_text`: whether it keeps to `TrainingText.private`; others are refused private runs."""
    makes: Literal["expert", "generalist"] = "expert"
    """What a run becomes: tensors that changed (`branch` and `train`), or a whole model (`tune`)."""
    restore: Callable[[PreTrainedModel, Path], PreTrainedModel] | None = None
    """`restore(model, folder)` makes the starting model into what was trained, from an expert's folder; None: the
    expert's tensors go over those of the same name."""
    require: Callable[[Path, Any, Sequence[str]], None] | None = None
    """`require(folder, options, domains)` raises `UserError` for a generalist, options or domains that it cannot train,
    before a run is set up and anything is replaced."""
    changes: Literal["all", "feed_forward"] = "all"
    """Which of the starting model's tensors can come out changed: an expert that someone else trained is held to it."""

    def __post_init__(self) -> None:
        _check_options(self.options, f"trainer '{self.name}'")


@dataclass(frozen=True)
class LaunchResult:
    """How one run ended, as the launcher saw it."""

    run: Path
    error: str | None
    """One line, or None when the run finished."""
    interrupted: bool = False


class RunReporter(Protocol):
    """What a launcher tells about its runs while they go on."""

    def started(self, run: Path, total_steps: int) -> None: ...
    def progressed(self, run: Path, record: Mapping[str, Any]) -> None: ...
    def finished(self, result: LaunchResult) -> None: ...


@dataclass(frozen=True)
class Launcher:
    """Where training runs: a process here, a node of a cluster, a data owner."""

    name: str
    summary: str
    launch: Callable[[Sequence[Path], int, RunReporter], list[LaunchResult]]
    """`launch(runs, jobs, reporter)` trains every run folder, at most `jobs` at a time, and returns when all
    have ended. One run that dies must not touch the others."""


# --- merging ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorGroup:
    """One tensor of the seed with the same tensor of every expert: all a per-tensor merge method sees.

    All of one shape, and float32 whatever the files hold (float64 where they hold that): the engine rounds once,
    when it writes. They are torch tensors, or numpy arrays where the method takes any (`MergeMethod.arrays`).
    A method must not change them.
    """

    name: str
    experts: tuple[Tensor, ...]
    """In the order of `expert_names`."""
    expert_names: tuple[str, ...]
    weights: tuple[float, ...]
    """One for each expert; what they mean says `MergeMethod.weights`."""
    seed_or_none: Tensor | None = None
    """None where the method does without (`MergeMethod.uses_seed`); all others read `seed`."""
    statistics: tuple[Tensor | None, ...] = ()
    """What `expertctl stats` gathered on this tensor, one for each expert, where the method asks for it."""

    @property
    def seed(self) -> Tensor:
        """The seed's tensor."""
        if self.seed_or_none is None:
            raise ValueError(f"there is no seed for '{self.name}': the method says that it does without")
        return self.seed_or_none


PerExpert = float | tuple[float, ...]
"""An option that may differ between experts: one number for all, or one for each, in their order."""


@dataclass(frozen=True)
class BuiltModel:
    """How a model came out that a merge method built."""

    weights: Mapping[str, float] | None = None
    """How much each expert counts; empty where that differs from text to text; None: the merge's weights."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """Options that the method chose by itself, as a user would give them to get the same model."""


@dataclass(frozen=True)
class MergeMethod:
    """A way from seed and experts to a generalist.

    Offer `merge` for a method that works tensor by tensor (the engine reads, streams and writes), `assemble` for one
    that puts experts' tensors together as a model of another class (the engine copies), or `build` for one that
    makes a model of its own kind.
    """

    name: str
    summary: str
    merge: Callable[[TensorGroup, Any], Tensor] | None = None
    """`merge(group, options)` returns the merged tensor. Pure; called once for each floating-point tensor, from
    several threads at once."""
    build: Callable[[MergeInputs, Any, Path], BuiltModel | None] | None = None
    """`build(inputs, options, folder)` writes a loadable model folder into `folder`, and may say how it came out."""
    kind: str = "average"
    """What comes out: `average`, `ensemble`, `moe` or `stitched`."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None. Every number in it may be set per layer and per
    module; a field annotated `PerExpert` per expert too. A trailing underscore (`lambda_`) is left out by users."""
    assemble: Callable[[Any, Any], Any] | None = None
    """`assemble(inputs, options)` plans a model of another architecture from the tensors of the experts: takes
    `merge.mixture.inputs.AssemblyInputs`, returns `merge.mixture.assembly.Assembly`; the engine reads and writes."""
    auto_classes: Callable[[], tuple[type, type]] | None = None
    """For a method whose model is no class of transformers: returns (config class, model class)."""
    uses_seed: bool | Callable[[Any], bool] = True
    """Whether `merge` reads the seed's tensors; a function of the options where it depends on them."""
    elementwise: bool = False
    """Every number of the result depends only on the same place of the inputs, so that the engine may hand over a
    tensor in pieces (flat ones) and never holds it whole."""
    keeps_seed: bool = True
    """Experts that all equal the seed give the seed, whatever the options; such tensors are copied unread."""
    arrays: Literal["torch", "any"] = "torch"
    """`any`: works on numpy arrays and torch tensors alike, and is spared the import of torch on a CPU."""
    weights: Literal["shares", "factors"] = "shares"
    """`shares`: at least 0, summing to 1. `factors`: as given, of any sign, 1 for each expert when not given."""
    expert_count: tuple[int, int | None] = (1, None)
    """Fewest and most experts that it can merge; None: no limit."""
    switch_off: Callable[[Any, Sequence[str], Collection[str]], PreTrainedModel] | None = None
    """`switch_off(model, experts, gone)` returns a loaded model without some of its `experts` (all, in order)."""
    takes_models: bool = False
    """Whether `build` takes any folder of a model with the seed's tokenizer, not only experts of the seed."""
    statistics: str | None = None
    """Kind of statistics (`gram`, `fisher`) that it needs from `expertctl stats`, or None."""

    def __post_init__(self) -> None:
        offered = [name for name in ("merge", "build", "assemble") if getattr(self, name) is not None]
        if len(offered) != 1:
            what = " and ".join(f"'{name}'" for name in offered) or "none"
            raise ValueError(
                f"merge method '{self.name}' offers {what} of 'merge', 'build' and 'assemble'; exactly one is needed"
            )
        _check_options(self.options, f"merge method '{self.name}'")


@dataclass(frozen=True)
class ValidationText:
    """The validation part of one domain, cut into blocks."""

    domain: str
    blocks: TokenBlocks


@dataclass(frozen=True)
class MergeInputs:
    """Everything a `build` merge method may read."""

    seed: Path
    """The seed's folder."""
    experts: Mapping[str, Path]
    """Expert folders by name, in the order the user gave."""
    weights: Mapping[str, float]
    """One for each expert, summing to 1."""
    weights_given: bool = False
    """Whether the user asked for these weights, or they are the default."""
    validation: Callable[[], Sequence[ValidationText]] = tuple
    """Returns what priors, temperatures and weights may be fitted on, preparing it when it is first asked for;
    empty when the merge was given none."""
    say: Callable[[str], None] = field(default=lambda line: None)
    """Tells the user what is going on, a line at a time."""


@dataclass(frozen=True)
class RouterInputs:
    """Everything that the start of a mixture's router may be made from. L = layers, E = experts, d = width."""

    seed: Path
    """Folder of the model whose hidden states the router will see."""
    experts: Mapping[str, Path | None]
    """In the order of the router's rows; None for one that is in no folder of its own."""
    num_layers: int
    width: int
    options: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the merge says of single experts, such as `{code: {positive_prompts: [...]}}`."""
    validation: Callable[[], Sequence[ValidationText]] = tuple
    domains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The domains that each expert was trained on, as far as is known."""
    say: Callable[[str], None] = field(default=lambda line: None)


@dataclass(frozen=True)
class RouterStart:
    """The rows and biases that a router begins with, float32 numpy arrays."""

    rows: Any
    """(L, E, d)."""
    biases: Any = None
    """(L, E), or None."""
    unit: Any = None
    """Vectors (L, E, d) that give about 1 for any hidden state, by which a bias can be folded into rows; or None."""


@dataclass(frozen=True)
class Router:
    """A way to begin the router of a mixture of given experts."""

    name: str
    summary: str
    start: Callable[[RouterInputs], RouterStart]
    """`start(inputs)`; raises `UserError` for what it lacks."""
    uses_model: bool = False
    """Whether it runs the seed, which plans leave for later."""
    uses_text: bool = False
    """Whether it reads validation text, so that the merge cannot be repeated from its manifest alone."""


# --- architectures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureShape:
    """What a mixture of experts is like, whatever family it is of."""

    num_experts: int
    top_k: int
    """Experts that each token passes through."""
    normalized: bool = True
    """Whether the gates of those experts sum to one."""
    router_bias: bool = False
    """Whether the router adds a bias to its logits."""


@dataclass(frozen=True)
class MixtureTarget:
    """A model class that dense models of a family can become as a mixture of experts, and how tensors are called there.

    Names of tensors are those within a layer: `mlp.up_proj.weight`.
    """

    name: str
    model_class: str
    """The class that `config.json` names."""
    config: Callable[[Mapping[str, Any], MixtureShape], dict[str, Any]]
    """`config(dense, shape)` returns the mixture's `config.json`, all it shares with the dense one taken over."""
    expert: Callable[[str, int], str]
    """`expert(name, number)` returns what the feed-forward's tensor `name` is called in expert `number`."""
    router: str
    """Name of the (experts, width) matrix of router rows."""
    refusal: Callable[[Mapping[str, Any], MixtureShape], str | None] = lambda dense, shape: None
    """`refusal(dense, shape)` returns the rule that a model breaks, in words, or None when it fits."""
    router_bias: str | None = None
    """Name of the router's bias (experts,), where the class has one."""
    zeros: Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]] = lambda config: {}
    """`zeros(config)` returns further tensors of every layer that are 0, by name, with their shapes."""
    prefix: str = ""
    """What stands before the dense model's names."""


@dataclass(frozen=True)
class Architecture:
    """Where a model family keeps its parts. Patterns are shell-style, over tensor names."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` values of `config.json` that belong to the family."""
    feed_forward: tuple[str, ...]
    attention: tuple[str, ...]
    norms: tuple[str, ...]
    embeddings: tuple[str, ...]
    mixtures: tuple[MixtureTarget, ...] = ()
    """What its feed-forwards can become the experts of, the first choice first."""


# --- evaluation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What one evaluator found for one model on one domain."""

    values: Mapping[str, float]
    """Metric name -> value, such as `{"bits_per_byte": 1.9}`."""
    tokens: int


@dataclass(frozen=True)
class Evaluator:
    """Scores a model on the validation part of a domain."""

    name: str
    summary: str
    metrics: tuple[str, ...]
    """Names of the values that it gives, the first one being what tables show."""
    evaluate: Callable[[PreTrainedModel, TokenBlocks], Score]


# --- what notifying hooks are told -----------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingStep:
    """One optimiser step of a run, as `training_step` hooks see it."""

    run: str
    folder: Path
    step: int
    total_steps: int
    metrics: Mapping[str, float]
    """`loss` in nats per token, `learning_rate`, `gradient_norm`, `tokens_per_second`."""


@dataclass(frozen=True)
class ExpertFinished:
    """An expert folder that is complete."""

    name: str
    folder: Path


@dataclass(frozen=True)
class MergeFinished:
    """A generalist folder that is complete."""

    name: str
    folder: Path
    method: str


def _check_options(options: type | None, what: str) -> None:
    if options is not None and not is_dataclass(options):
        raise ValueError(f"options of {what} are no dataclass")
