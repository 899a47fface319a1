"""Devices that models are trained on, and the links between them: common ones, and files of one's own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ...core.errors import UserError, first_line, unknown_name

HARDWARE_FILE = Path(__file__).parent / "hardware.yaml"
LINKS_GBIT = {
    "internet": 1.0,
    "ethernet10": 10.0,
    "ethernet100": 100.0,
    "infiniband400": 400.0,
    "infiniband3200": 3200.0,
}
"""Gbit/s between two nodes, each direction, of common links; infiniband3200 is eight links of 400, one for each GPU."""
LARGEST = 1e30
"""Largest number in a plan, so that no product of some of them overflows."""


@dataclass(frozen=True)
class Hardware:
    """A kind of device, and how many share a node; speeds are those that its maker states."""

    name: str
    tflops: float
    """Matrix products, in bfloat16 without sparsity, in 10^12 operations per second."""
    gb: float
    """Memory in GB (10^9 bytes)."""
    gb_per_s: float
    """Bandwidth of the memory in GB/s."""
    linked_gb_per_s: float
    """Bandwidth to another device of the node in GB/s, each direction."""
    per_node: int
    efficiency: float
    """Share of `tflops` that training reaches."""
    dollars_per_hour: float
    """Price of one device."""

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST:
                raise UserError(
                    f"hardware '{self.name}': {field.name} is {value!r:.40}; give a number above 0, at most {LARGEST:g}"
                )
        if self.per_node != int(self.per_node) or self.efficiency > 1:
            raise UserError(f"hardware '{self.name}': per_node is a whole number, and efficiency at most 1")


def hardware(name: str, file: Path | None = None) -> Hardware:
    """Return a kind of device by name, from a YAML file like `hardware.yaml` or the built-in one.

    Raises `UserError` for an unknown name and for wrong fields.
    """
    kinds = _read(file or HARDWARE_FILE)
    if name not in kinds:
        raise unknown_name("hardware", name, kinds)
    try:
        return Hardware(name, **kinds[name])
    except TypeError:
        wanted = ", ".join(field.name for field in fields(Hardware)[1:])
        raise UserError(f"hardware '{name}' in {file or HARDWARE_FILE}: give {wanted}, and nothing else") from None


def bandwidth_gbit(link: str) -> float:
    """Return the bandwidth of a link by name, or of a number of Gbit/s; raises `UserError` for anything else."""
    if link in LINKS_GBIT:
        return LINKS_GBIT[link]
    try:
        gbit = float(link)
    except ValueError:
        gbit = 0.0
    if not 0 < gbit < LARGEST:
        raise unknown_name("link", link, LINKS_GBIT)
    return gbit


@cache
def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, impossible dates
        raise UserError(f"{file} cannot be read as YAML: {first_line(error)}") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(kind, dict) for name, kind in content.items()
    ):
        raise UserError(f"{file}: give a mapping of names of hardware to their fields")
    return content
