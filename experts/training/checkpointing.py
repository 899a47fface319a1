"""Training checkpoints: written atomically, verified on reading, sufficient for a bit-identical resume."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...core.artefacts.digests import digest_of_tensors
from ...core.artefacts.files import clear_leftovers, new_folder, partial_sibling, read_json, remove_tree, write_json
from ...core.artefacts.safetensors_io import Checkpoint, write_tensors
from ...core.errors import UserError
from ...core.text.block_order import Position
from .distributed.parts import JoinedParts, part_name
from .distributed.ranks import Ranks
from .steps.loop import TrainingLoop

KEPT = 2
STATE_FILE = "state.json"


def save_checkpoint(loop: TrainingLoop, state_folder: Path, data: Mapping[str, str] | None = None) -> Path:
    """Write a checkpoint to `state_folder/step-N` and delete all but the newest two.

    `data` holds the digest of each domain's text, which must be the same on resume. All processes of a run must call this; the
    main one writes, or each its rows (`training.sharded_checkpoints`).
    """
    folder, states = state_folder / f"step-{loop.step:08d}", _tensors(loop)
    if _is_sharded(loop):
        own = {kind: loop.replica.own_rows(tensors) for kind, tensors in states.items()}
        _write_parts(folder, own, _state(loop, data), loop.ranks, loop.replica.shards)
    elif loop.ranks.is_main:
        _write(folder, states, _state(loop, data), loop.replica.write)
    else:
        for name, tensors in states.items():
            loop.replica.write(folder / name, tensors)
    return folder


class BackgroundCheckpoints:
    """Writes one checkpoint at a time in a thread, from a copy of the state in the CPU's memory."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
        self._ranks: Ranks | None = None

    def save(self, loop: TrainingLoop, state_folder: Path, data: Mapping[str, str]) -> None:
        """Begin a checkpoint, after the one before it; all processes of a run must call this."""
        self.wait()
        folder, states = state_folder / f"step-{loop.step:08d}", _tensors(loop)
        if _is_sharded(loop):
            own = {kind: _copied(loop.replica.own_rows(tensors)) for kind, tensors in states.items()}
            self._ranks = self._ranks or loop.ranks.apart()
            shards = loop.replica.shards
            self._writing = self._pool.submit(_write_parts, folder, own, _state(loop, data), self._ranks, shards)
            return
        copies: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensors in states.items():
            whole = ((key, loop.replica.full(tensor)) for key, tensor in tensors.items())
            copies[name] = {key: tensor.to("cpu", copy=True) for key, tensor in whole if loop.ranks.is_main}
        if loop.ranks.is_main:
            self._writing = self._pool.submit(_write, folder, copies, _state(loop, data), write_tensors)

    def wait(self) -> None:
        """Return once the last checkpoint is on disk; raises what its writing raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


def _is_sharded(loop: TrainingLoop) -> bool:
    return loop.config.sharded_checkpoints and loop.replica.shards > 1


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def _tensors(loop: TrainingLoop) -> dict[str, Mapping[str, torch.Tensor]]:
    return {
        "weights": loop.weights(),
        "optimiser": loop.optimiser_state() | loop.average_state(),
        "random": _random_states(),
    }


def _state(loop: TrainingLoop, data: Mapping[str, str] | None) -> dict[str, Any]:
    return {
        "step": loop.step,
        "position": asdict(loop.position),
        "torch": torch.__version__,
        "data": dict(data or {}),
        **loop.extra_state(),
    }


def _write(
    folder: Path,
    states: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    write: Callable[[Path, Mapping[str, torch.Tensor]], dict[str, str]],
) -> None:
    with new_folder(folder, force=True, what="checkpoint") as partial:
        digests = {
            name: digest_of_tensors(write(partial / f"{name}.safetensors", tensors)) for name, tensors in states.items()
        }
        write_json(partial / STATE_FILE, {**state, "digests": digests})
    _delete_old(folder.parent)


def _write_parts(
    folder: Path, own: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], ranks: Ranks, shards: int
) -> None:
    """Write this process's rows into files of its own, in a folder that the main process makes and puts in place.

    Raises `UserError` in all processes if one cannot write.
    """
    (pid,) = ranks.share([os.getpid() if ranks.is_main else 0])
    folder_of_all = nullcontext(partial_sibling(folder, int(pid)))
    with new_folder(folder, force=True, what="checkpoint") if ranks.is_main else folder_of_all as partial:
        ranks.wait()
        digests = {}
        with ranks.failing_together():
            for kind, tensors in own.items():
                path = partial / f"{part_name(kind, ranks.rank, shards)}.safetensors"
                digests[kind] = digest_of_tensors(write_tensors(path, tensors) if tensors else {})
        all_digests = {
            part_name(kind, rank, shards): of_rank
            for kind, digest in digests.items()
            for rank, of_rank in enumerate(ranks.gather(digest))
            if of_rank != digest_of_tensors({})
        }
        if ranks.is_main:
            write_json(partial / STATE_FILE, {**state, "digests": all_digests})
    if ranks.is_main:
        _delete_old(folder.parent)


def _delete_old(state_folder: Path) -> None:
    for old in sorted(state_folder.glob("step-*"))[:-KEPT]:
        remove_tree(old)


def drop_checkpoints_after(state_folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, but never the oldest."""
    for folder in sorted(state_folder.glob("step-*"))[1:]:
        if int(folder.name[5:]) > step:
            remove_tree(folder)


def restore_latest(loop: TrainingLoop, state_folder: Path, data: Mapping[str, str] | None = None) -> int:
    """Load the newest checkpoint into the loop and return its step, 0 if there is none.

    Raises `UserError` if the checkpoint is damaged, or if it was written for other text; it is never deleted.
    """
    with loop.ranks.main_first():
        clear_leftovers(state_folder)
    folders = sorted(state_folder.glob("step-*"))
    loop.ranks.require_agreement([folder.name for folder in folders], "checkpoints")  # or a folder that is not shared
    if not folders:
        return 0
    folder = folders[-1]
    previous = f"step {int(folders[-2].name[5:])}" if len(folders) > 1 else "the start"
    with loop.ranks.failing_together():
        try:
            state = read_json(folder / STATE_FILE)
            names = sorted(state["digests"])
            for name in names[loop.ranks.rank :: loop.ranks.world]:
                _verify(folder, name, state["digests"][name])
            files = {kind: _opened(folder, kind, names) for kind in ("weights", "optimiser", "random")}
            position = Position(**state["position"])
            step = int(state["step"])
            loop.load_extra_state(state)
        except (UserError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"checkpoint {folder} is damaged ({error}); delete it to resume from {previous}") from None
    if state.get("data", {}) != dict(data or {}):
        raise UserError(
            f"the text changed since checkpoint {folder} was written; restore the text, or delete {state_folder} to "
            "train from the start on the new text"
        )
    loop.load_weights(files["weights"])
    loop.load_optimiser_state(files["optimiser"])
    loop.step, loop.position = step, position
    if loop.ranks.is_main:
        _restore_random_states({name: files["random"].read(name) for name in files["random"]})
    return step


def _verify(folder: Path, name: str, digest: str) -> None:
    """Raise `UserError` if the tensors of a checkpoint's file have another digest."""
    if digest_of_tensors(Checkpoint([folder / f"{name}.safetensors"]).digests()) != digest:
        raise UserError(f"{name}.safetensors was changed")


def _opened(folder: Path, kind: str, names: Sequence[str]) -> JoinedParts:
    """Return the tensors of a checkpoint's files of one kind: `weights`, or `weights-00000-of-00002` and those after it."""
    parts = [name for name in names if name.partition("-")[0] == kind]
    if not parts:
        raise UserError(f"it has no {kind}")
    return JoinedParts([folder / f"{name}.safetensors" for name in parts])


def _random_states() -> dict[str, Any]:
    """Return the states of torch's generators, which dropout and trainers may use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    gpus = [states[name] for name in sorted(states) if name.startswith("cuda:")]
    if gpus and len(gpus) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(gpus)
