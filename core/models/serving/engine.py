"""Continuous batching: one thread per model reads prompts as they come and adds a token to all running texts at a time."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from ...errors import first_line
from ...process.compute import threads_for_tokens
from ..generation import weight_bytes
from .batch import Batch, Mode, Prediction, Reader, supported_mode
from .queues import FairQueue
from .requests import FinishReason, Job, NewToken, Progress
from .sampling import log_probabilities, next_tokens
from .text_stream import Decode, StopFinder, TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_PROMPT_TOKENS_AT_ONCE = 4096
"""Tokens of prompts that are read in one forward pass, if there are several prompts."""


class QueueFullError(Exception):
    """The queue has no place for another request."""


class StoppedError(Exception):
    """The engine accepts no requests any more."""


@dataclass(eq=False)
class _Row:
    """A running text."""

    job: Job
    random: random.Random
    text: TextStream
    stops: StopFinder
    last: int = 0
    """The latest token, which the model has not read yet."""
    ids: list[int] = field(default_factory=list)
    """All generated tokens."""
    pieces: list[str] = field(default_factory=list)
    """Text that was not reported yet."""
    tokens: list[NewToken] = field(default_factory=list)
    """Tokens that were not reported yet."""
    starts: list[int] = field(default_factory=list)
    """Where the text of each of them begins in the continuation."""
    num_characters: int = 0
    """Length of the text of all tokens."""
    num_certain: int = 0
    """Length of the text before what may be the begin of a stop text."""
    finish: FinishReason | None = None


class Engine:
    """Generates text for many requests with one model.

    A model whose rows can join a batch generates up to `max_rows` texts together; others generate one at a time, and
    clients take turns. `submit` may be called from any thread.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decode: Decode,
        *,
        end_tokens: Iterable[int] = (),
        expert_names: Sequence[str] = (),
        max_rows: int = 32,
        max_waiting: int = 256,
    ) -> None:
        self._model, self._decode = model, decode
        self._reader = Reader(model)
        self._end_tokens = frozenset(end_tokens)
        self._expert_names = tuple(expert_names)
        with torch.inference_mode():
            self.mode: Mode = supported_mode(model)
        self._max_rows = max_rows if self.mode == "batched" else 1
        self._max_waiting = max_waiting
        self._queue = FairQueue()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._rows: list[_Row] = []
        self._batch = Batch(self._reader)
        self._parked: tuple[list[_Row], Batch, Prediction] | None = None
        """Texts that have been read, but cannot join the running batch."""
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    # --- any thread ---

    @property
    def num_running(self) -> int:
        """Number of texts in the batch."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        with self._changed:
            return not (self._rows or self._queue or self._parked)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue requests, all or none; raises `QueueFullError` or `StoppedError`."""
        with self._changed:
            if self._is_stopping:
                raise StoppedError
            if len(self._queue) + len(jobs) > self._max_waiting:
                raise QueueFullError
            for job in jobs:
                self._queue.put(job)
            self._changed.notify()

    def stop(self) -> None:
        """Accept no more requests; running and waiting ones are finished unless they are cancelled."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end of all requests after `stop`; return whether they ended in time."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- the engine's thread ---

    def _run(self) -> None:
        with torch.inference_mode(), threads_for_tokens(weight_bytes(self._model)):
            while self._wait_for_work():
                try:
                    self._drop_ended()
                    self._admit()
                    if self._rows:
                        self._step()
                except Exception as error:  # out of memory, for example: these requests fail, later ones run
                    traceback.print_exc()
                    self._fail_all(f"generation failed: {first_line(error)}")

    def _wait_for_work(self) -> bool:
        """Wait until there are requests; return whether there are, false once the engine is to stop."""
        if self._rows or self._parked:
            return True
        with self._changed:
            while not self._queue and not self._is_stopping:
                self._changed.wait()
            return bool(self._queue)

    def _drop_ended(self) -> None:
        """Remove rows whose request was cancelled or has no time left."""
        now = time.monotonic()
        for row in self._rows:
            if row.job.cancelled.is_set():
                row.finish = "cancelled"
            elif row.job.deadline is not None and now >= row.job.deadline:
                row.finish = "length"
            if row.finish is not None:
                self._report(row)
        self._remove_finished()

    def _admit(self) -> None:
        """Read the prompts of waiting requests, as many as the batch has rows for; those of equal length together."""
        if self._parked is not None and not self._rows:
            parked, self._parked = self._parked, None
            self._join(*parked)
        if self._parked is not None or not (self._queue and self._batch.can_append()):
            return
        new = sorted(self._next_rows(self._max_rows - len(self._rows)), key=lambda row: len(row.job.request.prompt))
        for length, rows in groupby(new, key=lambda row: len(row.job.request.prompt)):
            size = max(MAX_PROMPT_TOKENS_AT_ONCE // length, 1)
            same = list(rows)
            for begin in range(0, len(same), size):
                self._read_prompts(same[begin : begin + size])

    def _next_rows(self, count: int) -> list[_Row]:
        """Take up to `count` requests from the queue; requests that were cancelled or waited too long end here."""
        rows: list[_Row] = []
        while len(rows) < count:
            with self._changed:
                if not self._queue:
                    break
                job = self._queue.pop()
            request = job.request
            text = TextStream(self._decode, request.prompt)
            row = _Row(job, random.Random(request.seed), text, StopFinder(request.stop))
            if job.cancelled.is_set():
                row.finish = "cancelled"
                self._report(row)
            elif job.deadline is not None and time.monotonic() >= job.deadline:
                self._end(row, Progress("", (), "cancelled", "the request waited too long for its turn"))
            else:
                rows.append(row)
        return rows

    def _read_prompts(self, rows: list[_Row]) -> None:
        """Read prompts of equal length and add their texts to the batch."""
        texts = [row.job.request.prompt for row in rows]
        with_experts = any(row.job.request.shares for row in rows)
        try:
            if self.mode == "uncached":
                prediction, _ = self._reader.read(texts, keeps_cache=False, with_experts=with_experts)
                self._join(rows, None, prediction)
                return
            batch, prediction = Batch.of_texts(self._reader, texts, with_experts=with_experts)
        except Exception as error:
            traceback.print_exc()
            for row in rows:
                self._end(row, Progress("", (), "cancelled", f"generation failed: {first_line(error)}"))
            return
        if self._rows and not batch.can_append():
            self._parked = (rows, batch, prediction)
        else:
            self._join(rows, batch, prediction)

    def _join(self, rows: list[_Row], batch: Batch | None, prediction: Prediction) -> None:
        first = len(self._rows)
        self._rows += rows
        if batch is not None:
            self._batch.append(batch)
        self._take_tokens(self._rows[first:], prediction)
        self._remove_finished()

    def _step(self) -> None:
        with_experts = any(row.job.request.shares for row in self._rows)
        if self.mode == "uncached":
            texts = [(*row.job.request.prompt, *row.ids) for row in self._rows]
            prediction, _ = self._reader.read(texts, keeps_cache=False, with_experts=with_experts)
        else:
            prediction = self._batch.step([row.last for row in self._rows], with_experts=with_experts)
        self._take_tokens(self._rows, prediction)
        self._remove_finished()

    def _take_tokens(self, rows: Sequence[_Row], prediction: Prediction) -> None:
        """Choose the next token of each row and report it."""
        requests = [row.job.request for row in rows]
        tokens = next_tokens(prediction.logits, requests, [row.random for row in rows])
        logprobs = log_probabilities(prediction.logits, tokens, requests)
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            request = row.job.request
            if token in self._end_tokens and not request.ignore_eos:
                row.finish = "stop"
            else:
                logprob, alternatives = logprobs.get(index, (None, ()))
                shares = None
                if request.shares:
                    shares = dict(zip(self._expert_names, prediction.shares(index, token), strict=True))
                self._add_token(row, token, logprob, alternatives, shares)
            if row.job.streams or row.finish is not None:
                self._report(row)

    def _add_token(
        self,
        row: _Row,
        token: int,
        logprob: float | None,
        alternatives: tuple[tuple[int, float], ...],
        shares: dict[str, float] | None,
    ) -> None:
        row.last = token
        row.ids.append(token)
        text = row.text.push(token)
        is_last = len(row.ids) >= row.job.request.max_tokens
        if is_last:
            text += row.text.finish()
        row.tokens.append(NewToken(token, text, logprob, alternatives, shares))
        row.starts.append(row.num_characters)
        row.num_characters += len(text)
        certain = row.stops.push(text)
        row.num_certain += len(certain)
        row.pieces.append(certain)
        if row.stops.found:
            row.finish = "stop"
        elif is_last:
            row.finish = "length"

    def _report(self, row: _Row) -> None:
        """Report the text that is certain and its tokens; at the end of a row, all that it has."""
        if row.finish is not None and not row.stops.found:
            if row.finish != "length" or len(row.ids) < row.job.request.max_tokens:
                row.pieces.append(row.stops.push(row.text.finish()))
            row.pieces.append(row.stops.finish())
            count = len(row.tokens)
        elif not row.job.request.stop:
            count = len(row.tokens)
        else:
            count = sum(start < row.num_certain for start in row.starts)
        text, tokens = "".join(row.pieces), tuple(row.tokens[:count])
        row.pieces.clear()
        del row.tokens[:count], row.starts[:count]
        if row.finish is not None:
            self._end(row, Progress(text, tokens, row.finish))
        elif text or tokens:
            self._tell(row, Progress(text, tokens))

    def _end(self, row: _Row, progress: Progress) -> None:
        row.finish = progress.finish
        self._tell(row, progress)

    def _tell(self, row: _Row, progress: Progress) -> None:
        try:
            row.job.listener(progress)
        except Exception:  # the listener's event loop has ended, for example
            row.job.cancel()

    def _remove_finished(self) -> None:
        kept = [index for index, row in enumerate(self._rows) if row.finish is None]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in kept]
        if self.mode != "uncached":
            self._batch.keep(kept)

    def _fail_all(self, message: str) -> None:
        """End all running texts with an error and begin with an empty batch."""
        parked = self._parked[0] if self._parked is not None else []
        for row in (*self._rows, *parked):
            if row.finish is None:
                self._end(row, Progress("", (), "cancelled", message))
        self._rows, self._parked, self._batch = [], None, Batch(self._reader)
