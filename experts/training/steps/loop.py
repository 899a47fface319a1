"""The training loop: optimiser steps on the trainable parameters, and the state for checkpoints."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ....core.artefacts.safetensors_io import Checkpoint, torch_dtype
from ....core.config.settings import TrainingConfig
from ....core.errors import UserError
from ....core.hooks.manager import installed_plugins
from ....core.hooks.steps import Batch, Loss, Optimiser, TrainingObjective
from ....core.hooks.training import TrainablePart
from ....core.manifests.statements import PrivacyStatement
from ....core.models.outline import Outline, TensorSource
from ....core.text.block_order import BalancedUnion, Position
from ....core.text.conversation_blocks import PairBlocks
from ....core.text.token_store import Blocks, Row
from ...runs.trainable import chosen_optimiser
from ..distributed.parts import JoinedParts
from ..distributed.ranks import ALONE, Ranks, Strategy
from ..distributed.replicas import laid_out, require_divisible
from .attention import choose_attention
from .averaging import FIELD, WeightAverage
from .block_stream import BlockStream
from .guards import Guards, is_finite
from .loss import WHOLE_LOGITS_BYTES, chunked_loss, next_token_loss, require_separable_documents, separate_loss
from .precision import autocast, resolve_device, store_weights, uses_bfloat16
from .recomputation import recompute_activations
from .schedule import learning_rate, progress_at


@dataclass(frozen=True)
class StepReport:
    """Result of one optimiser step."""

    step: int
    """Number of steps done, including this one."""
    loss: Tensor
    """Mean cross-entropy in nats per token, shape ()."""
    gradient_norm: Tensor
    """Norm of the gradient before clipping, shape ()."""
    learning_rate: float
    skipped: bool = False
    """Whether the weights were left as they are because the loss or the gradient is not finite."""
    drawn: Mapping[int, int] = field(default_factory=dict)
    """Number of the step's blocks, of all processes, by the number of their domain."""


class TrainingLoop:
    """Trainable parameters, their optimiser and the data position: everything that a checkpoint stores."""

    def __init__(
        self,
        part: TrainablePart,
        blocks: Blocks | BalancedUnion,
        config: TrainingConfig,
        ranks: Ranks = ALONE,
        strategy: Strategy = "ddp",
        *,
        separator: int | None = None,
        objective: TrainingObjective | None = None,
        outline: Outline | None = None,
        annealing: BlockStream | None = None,
    ) -> None:
        """Lay the model out over the processes of a run; `separator` is the token between documents, `annealing` has the blocks of
        the end of a run that anneals.

        Of an `outline`, of which `part` is the model, each process reads its part of the weights. Raises `UserError` for text and settings that they cannot train on.
        """
        if len(blocks) == 0:
            raise UserError(
                f"the text is shorter than one block of {config.sequence_length} tokens; add text or lower "
                "training.sequence_length"
            )
        assert (annealing is None) == (config.annealing is None), "a run that anneals has blocks for it"
        self.config, self.part = config, part
        self.text, self.annealing = BlockStream(blocks, config.seed), annealing
        self.objective = objective or TrainingObjective()
        self.device = resolve_device(config.device)
        if ranks.world > 1 and self.device.index is not None:
            raise UserError(
                f"training.device is {config.device}, one GPU for {ranks.world} processes; set it to auto or cuda"
            )
        self.step = 0
        frozen = [name for name, parameter in part.parameters.items() if not parameter.requires_grad]
        assert not frozen, f"the trainer froze a parameter that it declares trainable: {frozen[0]}"
        require_divisible(config.batch_size, ranks)
        self.ranks = ranks
        is_bfloat16 = uses_bfloat16(config, self.device)
        choose_attention(part.module, config, self.device, bfloat16=is_bfloat16)
        store_weights(part, config, self.device, outline.dtypes if outline is not None else None)
        if config.activation_checkpointing or (config.activation_checkpointing is None and part.spares_activations):
            recompute_activations(part.module, required=bool(config.activation_checkpointing))
        self.replica = laid_out(part, self.device, ranks, strategy, bfloat16=is_bfloat16, weights=outline)
        self.module, self.parameters = self.replica.module, self.replica.parameters
        self._autocast = autocast(config, self.device)
        with self._autocast():  # frozen layers in bfloat16 take no other numbers
            next_token = self._loss_function(separator)
        self._loss: Any = functools.partial(self.objective.loss, self.replica.forward, next_token=next_token)
        if config.compile:
            self._loss = torch.compile(self._loss)  # including the loss, which fuses with the logits
        self.optimiser = make_optimiser(self.parameters, config, is_sharded=ranks.world > 1 and strategy != "ddp")
        self.guards = Guards(config)
        self.drawn: Counter[int] = Counter()
        """Blocks of the present step by domain."""
        self.average = WeightAverage(config)

    @property
    def position(self) -> Position:
        """The next block to draw of the run's text, apart from that of its annealing."""
        return self.text.position

    @position.setter
    def position(self, position: Position) -> None:
        self.text.position = position

    @property
    def blocks(self) -> Blocks | BalancedUnion:
        """The run's text, apart from that of its annealing."""
        return self.text.blocks

    @property
    def notes(self) -> list[str]:
        """Lines for the user at the start: those of the trainer and the objective, and the memory of the optimiser."""
        size = installed_plugins().offer(Optimiser, self.config.optimiser).state_bytes(self.parameters)
        notes = [*self.part.notes, *self.objective.notes, f"state of {self.config.optimiser}: {size / 1e6:,.1f} MB"]
        sources = [stream.blocks for stream in self.streams]
        parts = [
            part for blocks in sources for part in (blocks.parts if isinstance(blocks, BalancedUnion) else (blocks,))
        ]
        if left_out := sum(part.num_left_out for part in parts if isinstance(part, PairBlocks)):
            notes.append(f"{left_out:,} pairs are longer than training.sequence_length and are left out")
        lengths = self.config.lengths
        if len(lengths) > 1:
            stages = ", then ".join(f"{length} up to step {steps.stop:,}" for steps, length in lengths)
            notes.append(f"tokens per block: {stages}")
        if self.config.annealing is not None:
            total = sum(self.config.annealing.domains.values())
            shares = ", ".join(f"{name} {weight / total:.0%}" for name, weight in self.config.annealing.domains.items())
            notes.append(
                f"annealing after step {self.config.annealing_begin:,}: blocks of {shares}, learning rate down to 0"
            )
        return notes

    @property
    def rows_at_a_time(self) -> int:
        """Blocks of a batch whose logits can be in memory together, where they are not computed in pieces."""
        return min(self.config.batch_size, max(WHOLE_LOGITS_BYTES // max(self._logits_bytes, 1), 1))

    @property
    def _logits_bytes(self) -> int:
        """Bytes of a block's logits in float32; 0 if the module does not tell its vocabulary."""
        return 4 * self.config.sequence_length * int(getattr(getattr(self.module, "config", None), "vocab_size", 0))

    @property
    def streams(self) -> tuple[BlockStream, ...]:
        """The blocks of all parts of the run."""
        return (self.text,) if self.annealing is None else (self.text, self.annealing)

    @property
    def stream(self) -> BlockStream:
        """The blocks of the next step."""
        return self.streams[-1 if self.step >= self.config.annealing_begin else 0]

    def _loss_function(self, separator: int | None) -> Loss:
        """Return the next-token loss by the settings `chunked_loss`, `separate_documents` and `pack_conversations`."""
        config, forward = self.config, self.replica.forward
        loss: Loss = next_token_loss
        is_large = config.batch_size // self.ranks.world * self._logits_bytes > WHOLE_LOGITS_BYTES
        if config.chunked_loss or (config.chunked_loss is None and (is_large or self.part.spares_activations)):
            self.part.begin_batch([0])
            chunked = chunked_loss(self.module, forward, self.device)
            if chunked is None and config.chunked_loss:
                raise UserError(
                    "training.chunked_loss: this model changes the logits of its last layer, or hides that layer; set it to false"
                )
            loss = chunked or loss
        rows = min(config.batch_size // self.ranks.world, 2)
        if config.separate_documents:
            assert separator is not None, "whoever reads the text knows its separator"
            self.part.begin_batch([0] * rows)
            require_separable_documents(self.module, forward, separator, self.device, rows=rows)
            loss = separate_loss(loss, separator)
        elif self.text.rows(self.objective)[0].positions is not None:
            self.part.begin_batch([0] * rows)
            is_text = config.pack_conversations or config.objective == "next_token"
            packed = "training.pack_conversations" if is_text else f"objective {config.objective}"
            require_separable_documents(self.module, forward, separator or 0, self.device, packed, rows=rows)
        return loss

    def steps(self) -> Iterator[StepReport]:
        """Train to the end of the budget; yields after each optimiser step."""
        while self.step < self.config.steps:
            self.part.begin_step(self.step)
            rate = learning_rate(self.config, progress_at(self.config, self.step))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            self.drawn.clear()
            loss = self.replica.mean(self._accumulate())
            norm = self._clip()
            skipped = not is_finite(loss, norm)
            if not skipped:
                self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.step += 1
            self.average.update(self.step, self.parameters)
            yield StepReport(self.step, loss, norm, rate, skipped, dict(self.drawn))

    def _accumulate(self) -> Tensor:
        """Run the forward and backward passes of one step and return the mean loss, without auxiliary losses.

        The mean is over all terms of the step (counted tokens), in whichever pass and process they are.
        """
        total = torch.zeros((), device=self.device)
        passes = [self._batch() for _ in range(self.config.accumulation)]
        terms = [self.objective.num_terms(batch) for _, batch in passes]
        (all_terms,) = self.ranks.share([sum(terms)])
        for number, (domains, batch) in enumerate(passes):
            self.part.begin_batch(domains)
            share = (
                terms[number] * self.ranks.world * self.config.accumulation / max(all_terms, 1)
            )  # 1 if all are equal
            with self.replica.accumulating(is_last=number + 1 == self.config.accumulation):
                with self._autocast():
                    loss = self._loss(batch)
                    objective = self._with_auxiliary(loss * share)
                torch.autograd.backward(objective / self.config.accumulation)
            total += loss.detach() * share / self.config.accumulation
        self.replica.finish_gradients()
        return total

    def _with_auxiliary(self, loss: Tensor) -> Tensor:
        auxiliary = self.part.auxiliary_loss()
        return loss if auxiliary is None else loss + auxiliary

    def _batch(self) -> tuple[list[int], Batch]:
        """Return this process's rows of the next batch of all processes with their domains, and advance the position."""
        stream, length = self.stream, self.config.length_at(self.step)
        cut_to = length if length != self.config.sequence_length else None
        rows: list[Row] = []
        domains: list[int] = []
        for number in range(self.config.batch_size):
            if number % self.ranks.world == self.ranks.rank:
                pieces = stream.rows(self.objective, cut_to)
                domains += [stream.domain] * len(pieces)
                rows += pieces
            self.drawn[stream.domain] += 1
            stream.advance()
        return domains, batch_of(rows, self.device)

    def _clip(self) -> Tensor:
        return self.replica.clip(self.config.clip if self.config.clip is not None else float("inf"))

    # --- state ---

    def weights(self) -> dict[str, Tensor]:
        """Return the trained parameters by name."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def optimiser_state(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors and numbers as `parameter name/field`."""
        state = self.optimiser.state
        return {
            f"{name}/{field}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name, parameter in self.parameters.items()
            for field, value in state.get(parameter, {}).items()
        }

    def average_state(self) -> dict[str, Tensor]:
        """Return the average of the weights as `parameter name/average`."""
        return {f"{name}/{FIELD}": tensor for name, tensor in self.average.tensors.items()}

    @torch.no_grad()
    def load_weights(self, stored: TensorSource) -> None:
        """Load the trained parameters; raises `UserError` if one is missing."""
        for name, parameter in self.parameters.items():
            self.replica.load(parameter, stored, name)

    def statement(self) -> PrivacyStatement | None:
        """Return the privacy statement of a private run, otherwise None."""
        return None

    def extra_state(self) -> dict[str, Any]:
        """Return additional checkpoint state, as JSON."""
        annealing = {} if self.annealing is None else {"annealing_position": asdict(self.annealing.position)}
        return {"guards": self.guards.state(), **annealing}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the additional state from a checkpoint's full state."""
        self.guards.load(state.get("guards", {}))
        if self.annealing is not None:
            self.annealing.position = Position(**state["annealing_position"])

    @torch.no_grad()
    def load_optimiser_state(self, stored: Checkpoint | JoinedParts) -> None:
        """Load the optimiser state of every parameter in a file, and the average; other parameters start without state."""
        shapes, average = stored.shapes(), {}
        for key in stored:
            name, _, field = key.rpartition("/")
            if name in self.parameters:
                parameter, (dtype, shape) = self.parameters[name], shapes[key]
                target = self.replica.like(parameter, shape, torch_dtype(dtype))
                self.replica.load(target, stored, key)
                if field == FIELD:
                    average[name] = target
                    continue
                is_number = shape == () and not target.dtype.is_floating_point
                self.optimiser.state[parameter][field] = int(target) if is_number else target
        self.average.load(average)


def batch_of(rows: Sequence[Row], device: torch.device) -> Batch:
    """Return blocks of one length as a batch; all targets of a block without marks count."""
    tokens = np.stack([row.tokens for row in rows])
    counted = positions = None
    if any(row.counted is not None for row in rows):
        every = np.ones(tokens.shape[1], dtype=bool)
        counted = np.stack([every if row.counted is None else row.counted for row in rows])[:, 1:]
    if any(row.positions is not None for row in rows):
        in_order = np.arange(tokens.shape[1])
        positions = np.stack([in_order if row.positions is None else row.positions for row in rows])[:, :-1]

    def moved(array: NDArray[Any] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array).to(device, non_blocking=True)

    return Batch(torch.from_numpy(tokens).to(device, non_blocking=True), moved(counted), moved(positions))


def make_optimiser(
    parameters: Mapping[str, nn.Parameter], config: TrainingConfig, *, is_sharded: bool = False
) -> Optimizer:
    """Return the optimiser that the settings name; raises `UserError` where it cannot be used."""
    optimiser, options = chosen_optimiser(config)
    if is_sharded and not optimiser.is_elementwise:
        raise UserError(
            f"optimiser '{optimiser.name}' needs whole tensors, which processes do not have in a sharded run; train with "
            "--strategy ddp, or with adamw"
        )
    return optimiser.make(parameters, config, options)
