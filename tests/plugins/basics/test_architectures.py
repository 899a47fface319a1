"""What the built-in families say of their tensors, against the models that transformers builds."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import transformers

from expertctl.core.artefacts.safetensors_io import Checkpoint
from expertctl.core.hooks.mixtures import Architecture
from expertctl.core.models.architectures import architecture_of
from expertctl.core.testing import fresh_plugins, tiny_model_folder

PLUGINS = fresh_plugins()
MODEL_TYPES = sorted(kind for family in PLUGINS.offers(Architecture).values() for kind in family.model_types)


def matching(names: set[str], patterns: tuple[str, ...]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_tensor_belongs_to_a_part_and_feed_forwards_to_no_other(tmp_path: Path, model_type: str) -> None:
    family = architecture_of(model_type)
    folder = tiny_model_folder(tmp_path / "m", model_type)
    names = set(Checkpoint.of_folder(folder))
    feed_forward = matching(names, family.feed_forward)
    others = matching(names, (*family.attention, *family.norms, *family.embeddings))
    assert feed_forward | others == names
    assert not feed_forward & others
    for part in ("feed_forward", "attention", "norms", "embeddings"):
        # OLMo's norms have no weights
        assert matching(names, getattr(family, part)) or (family.name, part) == ("olmo", "norms"), part


@pytest.mark.parametrize("family", PLUGINS.offers(Architecture).values(), ids=lambda family: family.name)
def test_mixture_classes_exist(family: Architecture) -> None:
    for target in family.mixtures:
        assert hasattr(transformers, target.model_class)
