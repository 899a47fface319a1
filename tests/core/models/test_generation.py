"""Generation from any artefact."""

from __future__ import annotations

from pathlib import Path

import torch

from expertctl.core.models.generation import Sampling, generate
from expertctl.core.process.compute import SINGLE_THREAD_BYTES, threads_for_tokens


def test_small_models_generate_on_one_thread_and_the_setting_is_restored(model_folder: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    try:
        with threads_for_tokens(SINGLE_THREAD_BYTES):
            seen.append(torch.get_num_threads())
        with threads_for_tokens(SINGLE_THREAD_BYTES + 1):
            seen.append(torch.get_num_threads())
        generate(model_folder, "The fox", Sampling(max_new_tokens=2))
        seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 2]
