"""A small model, copies of it, and a mixture of those, which has to be that model again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from expertctl.core.testing import tiny_model_folder
from expertctl.merge.merging import merge_recipe
from expertctl.merge.recipes.recipe import Recipe, whole_models

TOKENS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def copies(folder: Path, family: str, count: int, **settings: Any) -> dict[str, Path]:
    base = tiny_model_folder(folder / "base", family, **settings)
    models = {"base": base}
    for number in range(count):
        models[f"copy{number}"] = shutil.copytree(base, folder / f"copy{number}")
    return models


def mix(folder: Path, models: dict[str, Path], **options: Any) -> Path:
    names = [name for name in models if name != "base"]
    given = {"router": "random", **options}
    merge_recipe(Recipe("mixture", models, whole_models(names), seed="base", scopes=(given,)), folder / "mixture")
    return folder / "mixture"
