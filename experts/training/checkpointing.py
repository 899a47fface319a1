"""Checkpoints of a running training: complete or not there, checked when read, enough to go on bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.files import clear_leftovers, new_folder, read_json, remove_tree, write_json
from ...core.artefacts.lineage import digest_of_tensors
from ...core.artefacts.safetensors_io import Checkpoint, write_tensors
from ...core.errors import UserError
from ...core.text.token_store import Position
from .loop import TrainingLoop

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
STATE_FILE = "state.json"


def save_checkpoint(loop: TrainingLoop, state_folder: Path, data: Mapping[str, str] | None = None) -> Path:
    """Write everything that going on needs into `state_folder/step-N`, and drop all but the newest two.

    `data` holds the digest of each domain's text, which must be the same when the run goes on.
    """
    import torch

    folder = state_folder / f"step-{loop.step:08d}"
    with new_folder(folder, force=True, what="checkpoint") as partial:
        digests = {
            "weights": digest_of_tensors(write_tensors(partial / "weights.safetensors", loop.weights())),
            "optimiser": digest_of_tensors(
                write_tensors(partial / "optimiser.safetensors", loop.optimiser_state())
            ),
            "random": digest_of_tensors(write_tensors(partial / "random.safetensors", _random_states())),
        }
        state = {
            "step": loop.step,
            "position": asdict(loop.position),
            "torch": torch.__version__,
            "data": dict(data or {}),
            **loop.further_state(),
        }
        write_json(partial / STATE_FILE, state | {"digests": digests})
    for old in _checkpoints(state_folder)[:-KEPT]:
        remove_tree(old)
    return folder


def restore_latest(loop: TrainingLoop, state_folder: Path, data: Mapping[str, str] | None = None) -> int:
    """Put the newest checkpoint into the loop and return its step; 0 when there is none.

    Raises `UserError` for a damaged one, which is left where it is, and for one of other text.
    """
    clear_leftovers(state_folder)
    folders = _checkpoints(state_folder)
    if not folders:
        return 0
    folder = folders[-1]
    try:
        state = read_json(folder / STATE_FILE)
        tensors = {
            name: _read_checked(folder, name, state["digests"][name])
            for name in ("weights", "optimiser", "random")
        }
        position = Position(**state["position"])
        step = int(state["step"])
        loop.load_further_state(state)
    except (UserError, KeyError, TypeError, ValueError) as error:
        before = f"step {int(folders[-2].name[5:])}" if len(folders) > 1 else "the start"
        raise UserError(
            f"checkpoint {folder} is damaged ({error}); delete it to go on from {before}"
        ) from None
    if state.get("data", {}) != dict(data or {}):
        raise UserError(
            f"the text changed since checkpoint {folder} was written; put it back, or delete {state_folder} to "
            "train from the start on the new text"
        )
    loop.load_weights(tensors["weights"])
    loop.load_optimiser_state(tensors["optimiser"])
    loop.step, loop.position = step, position
    _restore_random_states(tensors["random"])
    return step


def _read_checked(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    checkpoint = Checkpoint([folder / f"{name}.safetensors"])
    if digest_of_tensors(checkpoint.digests()) != digest:
        raise UserError(f"{name}.safetensors was changed")
    return {tensor: checkpoint.read(tensor) for tensor in checkpoint}


def _checkpoints(state_folder: Path) -> list[Path]:
    return sorted(state_folder.glob("step-*"))


def _random_states() -> dict[str, Any]:
    """Return torch's generators, which dropout and plugins' trainers may draw from."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    import torch

    torch.set_rng_state(states["cpu"])
    gpus = [states[name] for name in sorted(states) if name.startswith("cuda:")]
    if gpus and len(gpus) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(gpus)
