"""The base of a model's rotary position embedding (RoPE), and the number of its positions, changed for longer contexts.

A larger base turns positions more slowly, so that training goes on with more of them ("adjusted base frequency", Llama 2 Long:
arXiv:2309.16039, section 4.1). The weights stay; they compute another function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_OLD_NAMES = ("rope_theta", "rotary_emb_base")
"""Names of the base outside `rope_parameters`, which older readers of `config.json` know."""


@dataclass(frozen=True)
class Positions:
    """What replaces a model's own RoPE base and number of positions; None keeps it."""

    base: float | None = None
    number: int | None = None

    def __post_init__(self) -> None:
        if self.base is not None and not 1 < self.base < math.inf:
            raise UserError(f"a RoPE base is a finite number above 1, not {self.base:g}")
        if self.number is not None and self.number < 1:
            raise UserError(f"a model has at least one position, not {self.number}")

    @property
    def is_given(self) -> bool:
        """Whether anything changes."""
        return self.base is not None or self.number is not None


def require_changeable_positions(config: PreTrainedConfig, positions: Positions, name: str) -> None:
    """Raise `UserError` for a model without RoPE, one that scales or mixes it, and for fewer positions than it has.

    `name` is what the user calls the model.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope or getattr(config, "alibi", False):
        raise UserError(f"{name} is of family '{config.model_type}' and has no RoPE whose base could be changed")
    if not isinstance(rope.get("rope_theta"), int | float):
        raise UserError(
            f"{name} has several kinds of RoPE ({', '.join(map(str, rope))}), of which no single base can be changed"
        )
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"{name} scales its RoPE ({rope['rope_type']}), which was made for its own base and positions; use a model with "
            "plain RoPE"
        )
    own = getattr(config, "max_position_embeddings", None)
    if positions.number is not None and not isinstance(own, int):
        raise UserError(f"{name} does not say how many positions it has, so their number cannot be changed")
    if positions.number is not None and positions.number < int(own or 0):
        raise UserError(f"{name} has {own} positions; give at least as many, not {positions.number}")


def with_positions(content: Mapping[str, Any], config: PreTrainedConfig, positions: Positions) -> dict[str, Any]:
    """Return the content of a `config.json` with other positions; `config` is what transformers reads from it."""
    changed = dict(content)
    if positions.base is not None:
        changed["rope_parameters"] = {**config.rope_parameters, "rope_theta": positions.base}
        changed.pop("rope_scaling", None)  # an older name of rope_parameters, which would win
        changed |= {key: positions.base for key in _OLD_NAMES if key in changed}
    if positions.number is not None:
        changed["max_position_embeddings"] = positions.number
    return changed


def write_positions(folder: Path, content: Mapping[str, Any], config: PreTrainedConfig, positions: Positions) -> None:
    """Replace `config.json` in a folder; raises `UserError` if transformers does not read what was written."""
    from transformers import AutoConfig

    (folder / "config.json").unlink(missing_ok=True)  # it may be linked to the original
    write_json(folder / "config.json", with_positions(content, config, positions))
    read = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found = Positions(read.rope_parameters.get("rope_theta"), getattr(read, "max_position_embeddings", None))
    for wanted, actual in ((positions.base, found.base), (positions.number, found.number)):
        if wanted is not None and wanted != actual:
            raise UserError(f"family '{config.model_type}' does not take other positions from config.json ({actual})")
