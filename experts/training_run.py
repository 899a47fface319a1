"""Carrying out one run: from `run.json` to a finished seed or expert, going on where an earlier try stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.config import ProjectConfig, load_project, parse_options
from ..core.errors import Interrupted, UserError
from ..core.files import readable_os_errors, remove_tree
from ..core.lineage import (
    TRAINING_FOLDER,
    Manifest,
    Parent,
    digest_of_tensors,
    digest_of_tokenizer,
    digests_of_folder,
    read_manifest,
    require_intact,
    tool_versions,
)
from ..core.loading import WEIGHTS_FILE, ExpertTensors, overlay_tensors
from ..core.plugin_manager import PluginManager, installed_plugins
from ..core.safetensors_io import Checkpoint, tensor_digest, torch_dtype, write_tensors
from ..core.scoring import token_log_probs
from ..core.token_store import BalancedUnion, Blocks, Concatenation, RandomSlice, TokenBlocks
from ..core.types import ExpertFinished, TrainablePart, TrainingStep
from ..core.workspace import Layout
from .checkpointing import restore_latest, save_checkpoint
from .corpora import PreparedDomain, prepare_domains
from .runs import METRICS_FILE, STATE_FOLDER, RunSpec, is_finished, read_run
from .training import StepReport, Throughput, TrainingLoop, autocast
from .trainable import trainer_for

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

OPTIMISER_FILE = Path(TRAINING_FOLDER) / "optimiser.safetensors"
PROGRESS_SECONDS = 0.5

Tell = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """A run with everything it reads: specification, project, prepared text."""

    folder: Path
    layout: Layout
    spec: RunSpec
    domains: tuple[PreparedDomain, ...]
    plugins: PluginManager

    @property
    def from_scratch(self) -> bool:
        return self.spec.kind == "seed"

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder if self.from_scratch else self.layout.seed

    @classmethod
    def open(cls, folder: Path) -> Run:
        spec = read_run(folder)
        layout = Layout.find(folder)
        project: ProjectConfig = load_project(layout.config_file)
        tokenizer = folder if spec.kind == "seed" else layout.seed
        domains = tuple(prepare_domains(layout, project, spec.domains, tokenizer))
        return cls(folder, layout, spec, domains, installed_plugins())


def train_run(folder: Path, tell: Tell, stopped: Callable[[], bool]) -> None:
    """Train the run in `folder` to its end, or until `stopped()`; a finished one costs nothing.

    `tell` hears a record of every half second or so. Raises `Interrupted` after a stop, with the state saved.
    """
    if is_finished(folder):
        remove_tree(folder / STATE_FOLDER)
        return
    run = Run.open(folder)
    model = _starting_model(run)
    part = trainer_for(run.spec.trains, run.plugins).prepare(
        model, _trainer_options(run)
    )
    loop = TrainingLoop(part, _training_blocks(run), run.spec.training)
    _inherit_optimiser(run, loop)
    begun_at = restore_latest(loop, folder / STATE_FOLDER)
    metrics = _MetricsLog(run, loop, tell)
    metrics.open(begun_at)
    last = _train(run, loop, metrics, stopped)
    validation = _validate(run, loop)
    metrics.write({"step": loop.step, "validation_loss": validation})
    final = {"loss": float(last.loss) if last else None, "validation_loss": validation}
    _finish(run, model, part, loop, final)
    run.plugins.expert_finished(ExpertFinished(run.spec.name, folder))
    remove_tree(folder / STATE_FOLDER)


def _train(run: Run, loop: TrainingLoop, metrics: _MetricsLog, stopped: Callable[[], bool]) -> StepReport | None:
    """Run the loop to its end with logs, looks at validation text and checkpoints on the way."""
    config = run.spec.training
    every = config.validate_every or max(config.steps // 4, 1)
    saved_at = time.monotonic()
    report = None
    for report in loop.steps():
        metrics.step(report)
        last = report.step == config.steps
        if report.step % every == 0 and not last:
            metrics.write({"step": report.step, "validation_loss": _validate(run, loop)})
        if stopped():
            save_checkpoint(loop, run.folder / STATE_FOLDER)
            raise Interrupted(f"'{run.spec.name}' stopped at step {report.step} of {config.steps}; the same command goes on")
        if not last and time.monotonic() - saved_at >= config.checkpoint_seconds:
            save_checkpoint(loop, run.folder / STATE_FOLDER)
            saved_at = time.monotonic()
    return report


# --- where it starts ---


def _starting_model(run: Run) -> PreTrainedModel:
    """Return the model to train, in float32: new, the seed, or an average of experts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if run.from_scratch:
        torch.manual_seed(run.spec.training.seed)
        config = AutoConfig.from_pretrained(run.folder, local_files_only=True)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-any-return]
    require_intact(run.layout.seed)
    torch.manual_seed(run.spec.training.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        run.layout.seed, dtype=torch.float32, local_files_only=True
    )
    if set(run.spec.start) != {"seed"}:
        overlay_tensors(model, _average_of(run))
    return model


def _average_of(run: Run) -> dict[str, Tensor]:
    """Return the weighted average of the experts a run starts from, where they differ from the seed."""
    seed = Checkpoint.of_folder(run.layout.seed)
    experts = {}
    for name in run.spec.start:
        if name != "seed":
            require_intact(run.layout.experts / name)
            experts[name] = ExpertTensors(seed, run.layout.experts / name)
    changed = sorted({name for expert in experts.values() for name in expert.changed})
    return {
        name: sum(
            weight * (seed if parent == "seed" else experts[parent]).read(name).float()
            for parent, weight in run.spec.start.items()
        )  # type: ignore[misc]
        for name in changed
    }


def _inherit_optimiser(run: Run, loop: TrainingLoop) -> None:
    """Take over the seed's optimiser state, which Branch-Train-Merge's branches keep."""
    path = run.layout.seed / OPTIMISER_FILE
    if run.spec.kind == "expert" and run.spec.training.inherit_optimiser and path.is_file():
        state = Checkpoint([path])
        loop.load_optimiser_state({name: state.read(name) for name in state})


def _trainer_options(run: Run) -> Any:
    trainer = trainer_for(run.spec.trains, run.plugins)
    return parse_options(trainer.options, run.spec.options, f"trainer '{trainer.name}'")


def _training_blocks(run: Run) -> Blocks | BalancedUnion:
    size = run.spec.training.sequence_length
    parts = [TokenBlocks(domain.open("train"), size) for domain in run.domains]
    for domain, blocks in zip(run.domains, parts, strict=True):
        if len(blocks) == 0:
            raise UserError(
                f"domain '{domain.name}' has {domain.train.tokens} tokens of training text, less than one block of "
                f"{size}; add text, or lower training.sequence_length"
            )
    if run.spec.slice is not None:
        index, count = run.spec.slice
        return RandomSlice(Concatenation(parts), index, count, run.spec.training.seed)
    return BalancedUnion(parts) if len(parts) > 1 else parts[0]


# --- on the way ---


def _validate(run: Run, loop: TrainingLoop) -> dict[str, float]:
    """Return the mean loss in nats per token on the first validation blocks of each domain."""
    import torch

    config = run.spec.training
    loop.module.eval()
    losses: dict[str, float] = {}
    with torch.inference_mode(), autocast(config, loop.device)():
        for domain in run.domains:
            blocks = TokenBlocks(domain.open("valid"), config.sequence_length)
            total, count = 0.0, 0
            for batch in blocks.batches(config.batch_size, limit=config.validation_blocks):
                scores = token_log_probs(loop.module, torch.from_numpy(batch).to(loop.device))
                total -= float(scores.double().sum())
                count += scores.numel()
            losses[domain.name] = total / max(count, 1)
    loop.module.train()
    return losses


class _MetricsLog:
    """Writes `metrics.jsonl`, tells plugins, and tells the launcher how far the run is."""

    def __init__(self, run: Run, loop: TrainingLoop, tell: Tell) -> None:
        self._run, self._loop, self._tell = run, loop, tell
        self._path = run.folder / METRICS_FILE
        self._throughput = Throughput()
        self._losses: list[Any] = []
        self._told_at = 0.0

    def open(self, begun_at: int) -> None:
        """Drop the lines of steps that will be done again, and tell where the run begins."""
        if self._path.is_file():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= begun_at]
            self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._tell({"event": "started", "step": begun_at, "total_steps": self._run.spec.training.steps})

    def step(self, report: StepReport) -> None:
        config = self._run.spec.training
        self._throughput.add(config.tokens_per_step)
        self._losses.append(report.loss)
        if report.step % config.log_every == 0 or report.step == config.steps:
            self._log(report)
        if time.monotonic() - self._told_at >= PROGRESS_SECONDS:
            self._told_at = time.monotonic()
            self._tell({"event": "progress", "step": report.step, "loss": float(report.loss)})

    def _log(self, report: StepReport) -> None:
        record = {
            "loss": float(sum(self._losses) / len(self._losses)),
            "learning_rate": report.learning_rate,
            "gradient_norm": float(report.gradient_norm),
            "tokens_per_second": self._throughput.take(),
        }
        self._losses.clear()
        self.write({"step": report.step, **record})
        spec = self._run.spec
        self._run.plugins.training_step(
            TrainingStep(spec.name, self._run.folder, report.step, spec.training.steps, record)
        )

    def write(self, record: Mapping[str, Any]) -> None:
        with readable_os_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut off by a crash belongs to no step


# --- the artefact ---


def _finish(run: Run, model: PreTrainedModel, part: TrainablePart, loop: TrainingLoop, metrics: Mapping[str, Any]) -> None:
    """Write the weights, then the manifest, whose presence means that the folder is complete."""
    if run.from_scratch:
        write_tensors(run.folder / WEIGHTS_FILE, _checkpoint_tensors(model))
        (run.folder / OPTIMISER_FILE).parent.mkdir(exist_ok=True)
        write_tensors(run.folder / OPTIMISER_FILE, loop.optimiser_state())
    else:
        write_tensors(run.folder / WEIGHTS_FILE, _changed_tensors(run, model))
    _manifest(run, part, metrics).write(run.folder)


def _checkpoint_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's tensors as they stand in its checkpoint: each shared one once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _changed_tensors(run: Run, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that differ from the seed's, in the seed's dtype."""
    seed = Checkpoint.of_folder(run.layout.seed)
    digests = read_manifest(run.layout.seed).tensors
    found = {}
    for name, tensor in model.state_dict().items():
        if name in seed:
            stored = tensor.to("cpu", torch_dtype(seed.entry(name).dtype))
            if tensor_digest(stored) != digests[name]:
                found[name] = stored
    if not found:
        raise UserError(f"training changed no tensor of '{run.spec.name}'; is its learning rate zero?")
    return found


def _manifest(run: Run, part: TrainablePart, metrics: Mapping[str, Any]) -> Manifest:
    spec = run.spec
    tensors, files = digests_of_folder(run.folder)
    return Manifest(
        kind=spec.kind,
        name=spec.name,
        digest=digest_of_tensors(tensors),
        tensors=tensors,
        files=files,
        tokenizer=digest_of_tokenizer(run.tokenizer_folder),
        parents=_parents(run),
        config=asdict(spec) | {"training": spec.training.model_dump(mode="json")},
        data={
            "domains": {domain.name: domain.statement() for domain in run.domains},
            "trained_tokens": spec.training.steps * spec.training.tokens_per_step,
        },
        metrics=metrics,
        trainable=spec.trains,
        owner=spec.owner,
        licence=spec.licence,
        versions=tool_versions(),
    )


def _parents(run: Run) -> tuple[Parent, ...]:
    if run.from_scratch:
        return ()
    seed = Parent("seed", "seed", read_manifest(run.layout.seed).digest, run.spec.start.get("seed"))
    experts = [
        Parent("expert", name, read_manifest(run.layout.experts / name).digest, weight)
        for name, weight in run.spec.start.items()
        if name != "seed"
    ]
    return (seed, *experts)
