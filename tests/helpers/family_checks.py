"""What expertctl can do with a family of models, found out with a tiny model.

Each check returns a cell of the table in `docs/families.md`: `yes`, or `no` with the number of the reason in `REASONS`.
A check fails if an operation neither works nor is refused before anything is written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from made_experts import write_expert
from safetensors.torch import load_file
from tiny_families import family_folder

from expertctl import UserError, load_model
from expertctl.core.artefacts.files import read_json
from expertctl.core.artefacts.layout import Layout
from expertctl.core.hooks.training import TrainingContext
from expertctl.core.models.loading import load_network
from expertctl.core.models.stored_names import StoredNames
from expertctl.experts.runs.seed import import_seed
from expertctl.experts.runs.trainable import changeable_tensors, trainer_for
from expertctl.plugins.methods.mixture_tuning import RouterTuning, prepare_router, require_mixture
from expertctl.workspace import Workspace

PROMPT = torch.arange(3, 13)[None]
YES = "yes"
REREADS = "yes, without a cache"
REASONS = (
    (r"no router to train", "It has no routers, or they are not known."),
    (r"mixtures? of experts", "It is a mixture of experts itself."),
    (
        r"no feed-forward tensors|feed-forward networks, and those of",
        "It has no feed-forward networks, or they are not known.",
    ),
    (
        r"not a single module|not one per decoder layer",
        "Its feed-forward networks are not one module per decoder layer.",
    ),
    (r"takes hidden_states, residual|has no hidden_size", "Its feed-forward networks read more than hidden states."),
    (r"its blocks read their weights", "Its blocks read the weights of their feed-forward networks."),
    (r"hands more than hidden states|channels from layer", "Its layers hand more than hidden states to each other."),
    (r"has no list of", "Its decoder is not one list of layers."),
)
"""(pattern of the message, reason) of refusals."""


def family_workspace(root: Path, family: str) -> Workspace:
    """Return a workspace with a seed of a family, under the names of its files, and experts `a` and `b`."""
    root.mkdir(parents=True)
    (root / "expertctl.yaml").write_text("training: {sequence_length: 16}\n", encoding="utf-8")
    source = family_folder(root / ".source", family)
    import_seed(Layout(root), source)
    assert names_in(root / "seed") == names_in(source)
    for number, name in enumerate(("a", "b"), start=1):
        write_expert(root, name, seed=number)
    return Workspace(root)


def names_in(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def refusal(message: str) -> str:
    """Return the cell for a refusal; raises `AssertionError` for one that is not expected."""
    assert "\n" not in message, message
    number = next((number for number, (pattern, _) in enumerate(REASONS, start=1) if re.search(pattern, message)), None)
    assert number is not None, message
    return f"no [{number}]"


def merged(workspace: Workspace, name: str, check: Callable[[Path], str], **settings: Any) -> str:
    """Merge and return the result of a check of the model, or the cell for a refusal."""
    folder = workspace.layout.generalists / name
    try:
        workspace.merge(name, **settings)
    except UserError as error:
        assert not folder.exists(), "refused after something was written"
        return refusal(str(error))
    return check(folder)


def feed_forward(workspace: Workspace) -> str:
    """Return whether the trainer `feed_forward` trains what delivered experts may change."""
    folder = workspace.layout.seed
    model = load_network(folder)
    allowed = changeable_tensors("feed_forward", names_in(folder), str(read_json(folder / "config.json")["model_type"]))
    if not allowed:
        return refusal("no feed-forward tensors")
    stored = StoredNames(model)
    part = trainer_for("feed_forward").prepare(TrainingContext(model))
    trained = {name for parameter in part.parameters for name in stored.of(parameter)}
    buffers = {name for buffer, _ in model.named_buffers() for name in stored.of(buffer)}
    assert trained <= allowed <= trained | buffers, trained ^ allowed
    return YES


def average(workspace: Workspace) -> str:
    """Return whether an average has the means of the experts' parameters, under the names that transformers writes."""

    def check(folder: Path) -> str:
        model = load_network(folder)
        experts = [dict(load_network(workspace.experts / name).named_parameters()) for name in ("a", "b")]
        for name, parameter in model.named_parameters():
            mean = sum(expert[name] for expert in experts) / 2
            torch.testing.assert_close(parameter, mean, atol=1e-6, rtol=1e-5, msg=name)
        model.save_pretrained(folder.with_name("again"))
        assert names_in(folder) == names_in(folder.with_name("again"))
        return YES

    return merged(workspace, "average", check, method="average")


def ensemble(workspace: Workspace) -> str:
    """Return whether an ensemble generates the same tokens with and without a cache."""
    return merged(workspace, "ensemble", _generates, method="ensemble", options={"prior": "uniform"})


def mixture(workspace: Workspace) -> str:
    """Return the class of a mixture of the experts that runs."""

    def check(folder: Path) -> str:
        model = load_network(folder)
        with torch.inference_mode():
            assert model(PROMPT).logits.isfinite().all()
        return f"`{type(model).__name__}`"

    return merged(workspace, "mixture", check, method="btx", options={"router": "random"})


def stitched(workspace: Workspace) -> str:
    """Return whether a stitched model runs, and generates the same tokens with and without a cache."""
    return merged(workspace, "stitched", _generates, method="stitch")


def routers(workspace: Workspace) -> str:
    """Return whether the routers of the model itself can be trained."""
    folder = workspace.layout.seed
    try:
        require_mixture(folder, RouterTuning(), ("prose",))
    except UserError as error:
        return refusal(str(error))
    model = load_network(folder).train()
    part = prepare_router(TrainingContext(model, RouterTuning()))
    loss = model(PROMPT, use_cache=False).logits.float().log_softmax(dim=-1)[..., 0].mean()
    auxiliary = part.auxiliary_loss()
    assert auxiliary is not None
    torch.autograd.backward(loss + auxiliary)
    weights = [parameter for name, parameter in part.parameters.items() if name.endswith(".weight")]
    assert weights
    assert all(weight.grad is not None and weight.grad.any() for weight in weights)
    assert part.measures()["router_entropy"] > 0
    return YES


CHECKS: dict[str, Callable[[Workspace], str]] = {
    "Feed-forward trainer": feed_forward,
    "Average": average,
    "Ensemble": ensemble,
    "Mixture": mixture,
    "Stitched": stitched,
    "Router tuning": routers,
}
"""Column of the table -> check."""


def _generates(folder: Path) -> str:
    model, _ = load_model(folder)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(PROMPT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached, anew = (
            model.generate(PROMPT, attention_mask=mask, use_cache=use_cache, **settings) for use_cache in (True, False)
        )
    assert torch.equal(cached, anew)
    with torch.inference_mode():
        assert model(PROMPT).logits.isfinite().all()
    return REREADS if any("keep no keys and values" in str(warning.message) for warning in caught) else YES
