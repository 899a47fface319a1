"""Generation with a cache gives the same tokens as without one, whatever the families keep between tokens."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import family_config, family_model

from expertctl import load_model
from expertctl.core.models.loading import load_network
from expertctl.merge.ensemble.model import EnsembleConfig, EnsembleForCausalLM
from expertctl.workspace import Workspace

pytestmark = pytest.mark.slow

FAMILIES = (
    "llama",
    "gemma2",
    "gemma3_text",
    "mistral",
    "gpt_oss",
    "lfm2",
    "falcon_h1",
    "bamba",
    "granitemoehybrid",
    "jamba",
    "qwen3_next",
    "qwen3_5_text",
    "olmo_hybrid",
)
"""One of each kind of cache; `tests/families` has all families."""
WITHOUT_A_CACHE = ("mamba", "mamba2", "rwkv")


def ensemble(family: str) -> EnsembleForCausalLM:
    mixer = {"prior": [0.5, 0.5], "prior_kind": "uniform"}
    member = family_config(family).to_dict() | {"model_type": family}
    stated = EnsembleConfig(member=member, experts=["a", "b"], mixer="posterior", mixer_settings=mixer)
    return EnsembleForCausalLM(stated, [family_model(family, seed) for seed in (0, 1)])


def generated(model: EnsembleForCausalLM, *, use_cache: bool) -> torch.Tensor:
    prompt = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0  # padding on the left
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=mask, use_cache=use_cache, **settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_no_token(family: str) -> None:
    model = ensemble(family)
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))


@pytest.mark.parametrize("family", WITHOUT_A_CACHE)
def test_families_without_keys_and_values_read_the_whole_text_and_say_so(family: str) -> None:
    model = ensemble(family)
    with pytest.warns(UserWarning, match=f"models of type '{family}' keep no keys and values"):
        cached = generated(model, use_cache=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="models of type")
        assert torch.equal(cached, generated(model, use_cache=False))


def test_experts_whose_tensors_are_stacked_in_memory_are_loaded(tmp_path: Path, new_workspace: Any) -> None:
    root = new_workspace(tmp_path / "ws", ["a", "b"], family="mixtral", changed="*.experts.1.*")
    Workspace(root).merge("m", method="ensemble", options={"prior": "uniform"})
    loaded, _ = load_model(root / "generalists" / "m")
    loaded.save_pretrained(tmp_path / "again")
    for model in (loaded, load_network(tmp_path / "again")):
        for number, name in enumerate(("a", "b")):
            expert, _ = load_model(root / "experts" / name)
            member = dict(model.members[number].named_parameters())
            assert all(torch.equal(member[key], parameter) for key, parameter in expert.named_parameters())
