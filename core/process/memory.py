"""Memory that this process and its children can still take, within the limits of its cgroups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

MEMINFO, OWN_CGROUPS, CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = MEMINFO, own_cgroups: Path = OWN_CGROUPS, cgroups: Path = CGROUPS) -> int | None:
    """Return the available memory in bytes, with free swap; None on systems that do not tell.

    Containers and jobs of a cluster are limited by cgroups, of version 1 or 2, below which the machine may have more.
    """
    try:
        kilobytes = _numbers(meminfo.read_text().replace(":", ""))
        free = [1024 * (kilobytes["MemAvailable"] + kilobytes.get("SwapFree", 0))]
        memberships = own_cgroups.read_text().splitlines()
    except (OSError, KeyError):
        return None
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers in ("", "memory"):
            free += _headrooms(cgroups / controllers, path)
    return max(min(free), 0)


def _headrooms(root: Path, path: str) -> Iterator[int]:
    """Yield limit minus usage, in bytes, of a cgroup and of those that contain it; cached files count as free."""
    leaf = root / path.lstrip("/")
    for group in [leaf, *leaf.parents]:
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                statistics = _numbers((group / "memory.stat").read_text())
                yield (
                    int((group / limit).read_text())
                    - int((group / usage).read_text())
                    + statistics.get("inactive_file", 0)
                )
            except (OSError, ValueError):  # no such group or file, or the limit is `max`
                continue
        if group == root:
            return


def _numbers(text: str) -> Mapping[str, int]:
    """Return `name number` lines as a dictionary."""
    words = (line.split() for line in text.splitlines())
    return {fields[0]: int(fields[1]) for fields in words if len(fields) > 1 and fields[1].isdigit()}
