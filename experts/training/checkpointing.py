"""Training checkpoints: written atomically, verified on reading, sufficient for a bit-identical resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...core.artefacts.digests import digest_of_tensors
from ...core.artefacts.files import clear_leftovers, new_folder, read_json, remove_tree, write_json
from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError
from ...core.text.token_store import Position
from .steps.loop import TrainingLoop

KEPT = 2
STATE_FILE = "state.json"


def save_checkpoint(loop: TrainingLoop, state_folder: Path, data: Mapping[str, str] | None = None) -> Path:
    """Write a checkpoint to `state_folder/step-N` and delete all but the newest two.

    `data` holds the digest of each domain's text, which must be the same on resume. All processes of a run must call this; the
    main one writes.
    """
    folder = state_folder / f"step-{loop.step:08d}"
    states = {"weights": loop.weights(), "optimiser": loop.optimiser_state(), "random": _random_states()}
    if not loop.ranks.is_main:
        for name, tensors in states.items():
            loop.replica.write(folder / name, tensors)
        return folder
    with new_folder(folder, force=True, what="checkpoint") as partial:
        digests = {
            name: digest_of_tensors(loop.replica.write(partial / f"{name}.safetensors", tensors))
            for name, tensors in states.items()
        }
        state = {
            "step": loop.step,
            "position": asdict(loop.position),
            "torch": torch.__version__,
            "data": dict(data or {}),
            **loop.extra_state(),
        }
        write_json(partial / STATE_FILE, state | {"digests": digests})
    for old in sorted(state_folder.glob("step-*"))[:-KEPT]:
        remove_tree(old)
    return folder


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
    if not folders:
        return 0
    folder = folders[-1]
    try:
        state = read_json(folder / STATE_FILE)
        files = {
            name: _checked(folder, name, state["digests"][name], is_read=loop.ranks.is_main)
            for name in ("weights", "optimiser", "random")
        }
        position = Position(**state["position"])
        step = int(state["step"])
        loop.load_extra_state(state)
    except (UserError, KeyError, TypeError, ValueError) as error:
        previous = f"step {int(folders[-2].name[5:])}" if len(folders) > 1 else "the start"
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


def _checked(folder: Path, name: str, digest: str, *, is_read: bool) -> Checkpoint:
    """Return a file of a checkpoint; raises `UserError` if `is_read` and its tensors have another digest."""
    checkpoint = Checkpoint([folder / f"{name}.safetensors"])
    if is_read and digest_of_tensors(checkpoint.digests()) != digest:
        raise UserError(f"{name}.safetensors was changed")
    return checkpoint


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
