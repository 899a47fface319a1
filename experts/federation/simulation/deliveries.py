"""Stand-in deliveries: experts of a few bytes that pass or fail the same checks as large ones.

Keys, signatures, manifests and digests are real; only the tensors are tiny and untrained. The simulation computes the transfer
times of a full-size expert separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ....core.artefacts.digests import digest_of_tensors, digests_of_folder
from ....core.artefacts.files import remove_tree, write_json
from ....core.artefacts.layout import Layout
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint, write_tensors
from ....core.config.settings import TrainingConfig
from ....core.manifests.manifest import Manifest, Parent, read_manifest
from ....core.manifests.run import RunSpec
from ....core.manifests.statements import DataStatement, DomainStatement
from ..protocol.delivery import SignedStatement, make_delivery
from ..protocol.keys import read_key
from ..protocol.requests import ExpertRequest, Recipe

Delivers = Literal["good", "not_finite", "wrong_shape", "scaled_up", "frozen_part", "forged", "someone_elses", "replay"]
"""Kind of delivery: a valid expert, or one of the invalid ones that a coordinator must refuse."""

RECIPE = Recipe("feed_forward")
_UP, _DOWN, _FROZEN = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight")


def write_stand_in_seed(folder: Path) -> Layout:
    """Write a workspace with a seed of a few parameters."""
    layout = Layout(folder)
    layout.seed.mkdir(parents=True)
    layout.config_file.touch()
    write_json(layout.seed / "config.json", {"model_type": "llama", "num_hidden_layers": 1})
    source = torch.Generator().manual_seed(0)
    shapes = {_UP: (6, 4), _DOWN: (4, 6), _FROZEN: (4,)}
    tensors = {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}
    _write_artefact(layout.seed, tensors, kind="seed", name="seed")
    return layout


class StandIns:
    """Creates owners' keys and deliveries, in folders that `forget` deletes."""

    def __init__(self, root: Path, layout: Layout) -> None:
        self.root = root
        self._seed = Checkpoint.of_folder(layout.seed)
        self.seed_digest = read_manifest(layout.seed).digest
        self._signed: dict[str, SignedStatement] = {}
        self.last_accepted: int | None = None
        """Number of the owner whose expert was accepted last, for replays."""

    def delivery(self, request: ExpertRequest, number: int, delivers: Delivers) -> tuple[Path, SignedStatement]:
        """Return the folder and signed statement of an owner's delivery, created on the first call."""
        state = self.root / request.owner
        folder = state / "delivery"
        if request.owner not in self._signed:
            key, expert = read_key(state), state / "expert"
            expert.mkdir()
            owner, trains = request.owner, request.recipe.trains
            RunSpec("expert", owner, (owner,), TrainingConfig(), trains, owner=owner).write(expert)
            _write_artefact(
                expert,
                self._tensors(number, delivers),
                kind="expert",
                name=owner,
                parents=(Parent("seed", "seed", self.seed_digest, 1.0),),
                data=DataStatement({owner: DomainStatement(100, 10_000, 40_000)}),
                trainable=trains,
                owner=owner,
            )
            signed = make_delivery(expert, request, key, folder)
            if delivers == "forged":
                signed = replace(signed, statement=replace(signed.statement, data=DataStatement(trained_tokens=1)))
            elif delivers == "someone_elses":
                statement = replace(signed.statement, owner=f"{request.owner}-x")
                signed = SignedStatement(statement, key.sign(statement.signed_bytes))
            self._signed[request.owner] = signed
        return folder, self._signed[request.owner]

    def forget(self, name: str) -> None:
        """Delete an owner's key and delivery."""
        self._signed.pop(name, None)
        remove_tree(self.root / name)

    def _tensors(self, number: int, delivers: Delivers) -> dict[str, Tensor]:
        if delivers == "replay" and self.last_accepted is not None:
            number = self.last_accepted
        source = torch.Generator().manual_seed(number)
        tensors = {}
        for name in (_UP, _DOWN):
            tensor = self._seed.read(name)
            tensors[name] = tensor + 0.01 * torch.randn(tensor.shape, generator=source)
        if delivers == "not_finite":
            tensors[_UP][0, 0] = float("nan")
        elif delivers == "wrong_shape":
            tensors[_UP] = tensors[_UP].T.contiguous()
        elif delivers == "scaled_up":
            tensors[_UP] = 100 * tensors[_UP]
        elif delivers == "frozen_part":
            tensors[_FROZEN] = self._seed.read(_FROZEN) + 0.1
        return tensors


def _write_artefact(folder: Path, tensors: Mapping[str, Tensor], **entries: Any) -> None:
    """Add tensors and a manifest with these entries to a folder."""
    write_tensors(folder / SINGLE_FILE, tensors)
    digests, files = digests_of_folder(folder)
    digest = digest_of_tensors(digests)
    Manifest(digest=digest, tensors=digests, files=files, tokenizer="0" * 64, **entries).write(folder)
