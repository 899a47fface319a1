"""Fixtures: a coordinator with a tiny seed, and owners with private text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federation_members import MODULES, Clock, private_text

from expertctl.core.artefacts.layout import Layout
from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.owner.owner import Owner, OwnerSettings
from expertctl.experts.federation.protocol.keys import make_key


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def coordinator(tmp_path: Path, new_workspace: Any, clock: Clock) -> Coordinator:
    return Coordinator(Layout(new_workspace(tmp_path / "hub", experts=())), now=clock)


@pytest.fixture
def new_owner(tmp_path: Path, coordinator: Coordinator) -> Callable[[str], Owner]:
    """Return a function that creates an owner with text and a key, and invites it."""

    def make(name: str) -> Owner:
        owner = Owner(tmp_path / f"state-{name}")
        key = make_key(owner.state)
        owner.configure(OwnerSettings(private_text(tmp_path / f"{name}.jsonl", MODULES[name])))
        coordinator.files.members.add(name, key.public)
        return owner

    return make
