"""Statistics of an expert for RegMean and Fisher merges, computed where its data is.

They are second moments only: Gram matrices of layer inputs, or squared gradients. They still carry information about
the text, so share them only where the expert itself may be shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.artefacts.digests import digest_of_tensors
from ...core.artefacts.files import new_folder, refuse_existing, write_json
from ...core.artefacts.layout import STATISTICS_FORMAT, STATISTICS_MANIFEST, STATISTICS_WEIGHTS
from ...core.artefacts.safetensors_io import write_tensors
from ...core.artefacts.versions import tool_versions
from ...core.errors import UserError
from ...core.manifests.manifest import read_manifest
from ...core.models.adapters.prompts import refuse_prompt
from ...core.models.loading import checkpoint_tensors, load_network
from ...core.process.compute import best_device
from ...core.reporting import SILENT, Reporter, reported
from ...core.text.token_store import TokenBlocks, spread

Kind = Literal["gram", "fisher"]
KINDS: tuple[Kind, ...] = ("gram", "fisher")


def gather_grams(model: PreTrainedModel, blocks: Iterable[NDArray[Any]]) -> dict[str, Tensor]:
    """Return X^T X / N of each linear layer's inputs in float32, by the name of its weight (arXiv:2212.09849, section 3).

    `blocks` are token arrays of shape (tokens + 1,), N is the number of tokens. All matrices are in memory at once, in^2
    numbers per layer. Layers with a tied weight, such as a tied output head, are skipped. Raises `UserError` without blocks.
    """
    stored = checkpoint_tensors(model)
    layers = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and f"{name}.weight" in stored
    }
    sums: dict[str, Tensor] = {}
    tokens = 0

    def add_inputs(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        flat = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        product = (flat.T @ flat).double().cpu()
        sums[name] = sums[name] + product if name in sums else product

    with ExitStack() as hooks, torch.inference_mode():
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(add_inputs, name)))
        for block in blocks:
            model(input_ids=torch.from_numpy(block[None, :-1]).to(model.device), use_cache=False)
            tokens += len(block) - 1
    if not tokens:
        raise UserError("no text to compute statistics on; run `expertctl data prepare`")
    return {name: (total / tokens).float() for name, total in sums.items()}


def gather_fisher(model: PreTrainedModel, blocks: Iterable[NDArray[Any]]) -> dict[str, Tensor]:
    """Return E[(grad log p(block))^2] for every tensor in float32, the mean over blocks (arXiv:2111.09832, section 3.2).

    log p is the sum over a block's tokens, given the token before it. This is the empirical Fisher information, which
    uses the text instead of samples from the model. Raises `UserError` without blocks.
    """
    stored = checkpoint_tensors(model)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in stored and parameter.is_floating_point()
    }
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    count = 0
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for block in blocks:
        count += 1
        model.zero_grad(set_to_none=True)
        tokens = torch.from_numpy(block[None]).to(model.device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0].float(), tokens[0, 1:], reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]  # not annotated in torch
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.float() ** 2
    model.zero_grad(set_to_none=True)
    if not count:
        raise UserError("no text to compute statistics on; run `expertctl data prepare`")
    return {name: (total / count).cpu() for name, total in sums.items()}


def write_statistics(
    expert: Path,
    seed: Path,
    blocks: TokenBlocks,
    kind: Kind,
    output: Path,
    *,
    domain: Mapping[str, Any],
    samples: int,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Compute one kind of statistics for an expert, write them to `output/KIND/` and return their manifest.

    The blocks are evenly spaced. Raises `UserError` if the statistics exist already, unless `force`.
    """
    target = output / kind
    refuse_prompt(expert, "statistics for merges")
    refuse_existing(target, force=force, what="statistics")
    manifest = read_manifest(expert)
    model = load_network(expert, seed=seed, dtype="float32", as_trained=False).to(best_device())
    gather = gather_grams if kind == "gram" else gather_fisher
    tensors = gather(model, reported(spread(blocks, samples), reporter, kind, "blocks"))
    with new_folder(target, force=force, what="statistics") as partial:
        digests = write_tensors(partial / STATISTICS_WEIGHTS, tensors)
        content = {
            "format": STATISTICS_FORMAT,
            "kind": kind,
            "expert": manifest.name,
            "expert_digest": manifest.digest,
            "domain": dict(domain),
            "blocks": min(samples, max(len(blocks), 1)),
            "tokens_per_block": blocks.block_size,
            "digest": digest_of_tensors(digests),
            "tensors": digests,
            "versions": tool_versions(),
        }
        write_json(partial / STATISTICS_MANIFEST, content)
    return content
