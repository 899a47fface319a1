"""Available memory: of the machine, and below the limits of a process's cgroups in either version."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertctl.core.process.memory import available_memory

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with 1000 MiB available and 24 MiB of free swap, whose process is in no limited cgroup."""
    (tmp_path / "meminfo").write_text(
        f"MemTotal: {4000 * 1024} kB\nMemAvailable: {1000 * 1024} kB\nSwapFree: {24 * 1024} kB\n"
    )
    (tmp_path / "cgroup").write_text("0::/user/job\n")
    return tmp_path


def limit(
    group: Path, most: str, used: int, cached: int, names: tuple[str, str] = ("memory.max", "memory.current")
) -> None:
    group.mkdir(parents=True)
    (group / names[0]).write_text(f"{most}\n")
    (group / names[1]).write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def available(machine: Path) -> int | None:
    return available_memory(machine / "meminfo", machine / "cgroup", machine / "cgroups")


def test_without_limits_it_is_that_of_the_machine(machine: Path) -> None:
    limit(machine / "cgroups" / "user" / "job", "max", 5, 0)
    assert available(machine) == 1024 * MIB


def test_the_tightest_of_the_containing_groups_counts(machine: Path) -> None:
    limit(machine / "cgroups" / "user", str(500 * MIB), 200 * MIB, 50 * MIB)
    limit(machine / "cgroups" / "user" / "job", str(900 * MIB), 200 * MIB, 0)
    assert available(machine) == 350 * MIB


def test_groups_of_version_1_are_read(machine: Path) -> None:
    (machine / "cgroup").write_text("5:cpu:/elsewhere\n3:memory:/job\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit(machine / "cgroups" / "memory" / "job", str(64 * MIB), 60 * MIB, 0, names)
    assert available(machine) == 4 * MIB


def test_a_container_that_sees_its_own_group_as_the_root_is_limited(machine: Path) -> None:
    limit(machine / "cgroups", str(100 * MIB), 120 * MIB, 0)
    assert available(machine) == 0


def test_other_systems_do_not_tell(tmp_path: Path) -> None:
    assert available(tmp_path) is None


def test_this_machine_has_some() -> None:
    here = available_memory()
    assert here is None or here > 0
