"""LoRA (arXiv:2106.09685): an expert that is a low-rank adapter of the frozen seed, trained and stored as PEFT does.

The folder of such an expert is a PEFT folder, which `peft.PeftModel.from_pretrained(seed, folder)` loads, with the
manifest beside it. Merges and ensembles apply the adapter to the seed's tensors (`core/models/adapters/lora.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least, check_positive
from ...core.hooks.training import SideTensor, TrainablePart, Trainer, TrainingContext
from ...core.manifests.manifest import read_manifest
from ...core.models.adapters.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ...core.models.architectures import architecture_of
from ...core.models.kernels.quantised_linear import quantise, require_quantisation
from ...core.models.stored_names import StoredNames, empty_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
"""Prefix of tensor names in PEFT's files: the modules that PEFT wraps a model in."""
LARGEST_FACTOR, LARGEST_NORM = 30.0, 1e4
"""Largest numbers in factors and in DoRA's magnitudes that training can lead to; A begins with less than 1, B with 0, and
magnitudes with norms of rows."""


@dataclass(frozen=True)
class LoraTraining:
    """Options of a LoRA adapter."""

    rank: int = 8
    """Rank of the change of each matrix."""
    alpha: int = 16
    """The change is multiplied by alpha / rank."""
    targets: str | None = None
    """Linear layers to adapt: names or shell-style patterns of modules, separated by commas (`q_proj,v_proj`). Not set:
    all linear layers of attention and feed-forward networks."""
    rslora: bool = False
    """Multiply the change by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Train the norm of each output row apart from its direction (DoRA, arXiv:2402.09353)."""
    dropout: float = 0.0
    """Dropout of the adapter's input."""

    def __post_init__(self) -> None:
        check_at_least("rank", self.rank, 1)
        check_positive("alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and less than 1")


class LoraPart(TrainablePart):
    """The factors A and B, and with DoRA the magnitudes, of a model in which PEFT replaced linear layers."""

    keeps_float32 = True
    spares_activations = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad})

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def extra_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        from peft import get_peft_model_state_dict

        trained = {name: parameter.detach() for name, parameter in self.parameters.items()}
        tensors = get_peft_model_state_dict(self.module, state_dict=trained, save_embedding_layers=False)
        return {ADAPTER_WEIGHTS: {PREFIX + name: tensor for name, tensor in tensors.items()}}


def require_lora(folder: Path, options: LoraTraining, domains: Sequence[str]) -> None:
    """Raise `UserError` if PEFT is missing, or if the options do not fit the model in a folder."""
    try:
        import peft  # noqa: F401  # whether it works with the installed transformers, too
    except ImportError as error:
        raise UserError(f'trainer lora needs peft ({error}); install it with: pip install "expertctl[lora]"') from None
    target_layers(empty_model(folder), options)


def require_qlora(folder: Path, options: LoraTraining, domains: Sequence[str]) -> None:
    """Raise `UserError` if PEFT or bitsandbytes is missing, or if the options do not fit the model in a folder."""
    require_lora(folder, options, domains)
    require_quantisation("nf4")


def prepare(context: TrainingContext) -> TrainablePart:
    """Freeze the model and add an adapter to its linear layers; A is drawn from torch's generator, B is 0."""
    return _with_adapter(context.model, _settings(context.model, context.options))


def prepare_quantised(context: TrainingContext) -> TrainablePart:
    """Do the same after the linear layers' weights were rounded to 4 bits."""
    model: Any = context.model
    settings = _settings(model, context.options)
    quantise(model, "nf4")
    model.is_loaded_in_4bit = True  # PEFT asks for it
    return _with_adapter(model, settings)


def _with_adapter(model: PreTrainedModel, settings: Mapping[str, Any]) -> TrainablePart:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about settings that are checked here
        inject_adapter_in_model(config, model)
    return LoraPart(model)


def _settings(model: PreTrainedModel, options: LoraTraining) -> dict[str, Any]:
    """Return the arguments of PEFT's `LoraConfig` that differ from its defaults or that readers look for."""
    layers = target_layers(model, options)
    return {
        "task_type": "CAUSAL_LM",
        "r": options.rank,
        "lora_alpha": options.alpha,
        "target_modules": _shortest_names(model, layers),
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "lora_dropout": options.dropout,
        "fan_in_fan_out": _are_transposed(layers),
        "bias": "none",
    }


def adapter_config(seed: Path, options: LoraTraining) -> Mapping[str, Mapping[str, Any]]:
    """Return the file that PEFT reads an adapter's settings from; without PEFT's version, its bytes depend on these alone."""
    settings = _settings(empty_model(seed), options)
    base = {"peft_type": "LORA", "base_model_name_or_path": read_manifest(seed).name, "inference_mode": True}
    return {ADAPTER_CONFIG: {**base, **settings}}


def adapter_file(seed: Path, options: LoraTraining) -> Mapping[str, Mapping[str, SideTensor]]:
    """Return the tensors of an adapter; those of layers that store (in, out) have the same shapes as all others."""
    tensors = {}
    layers = target_layers(empty_model(seed), options)
    for name, layer in layers.items():
        weight: Any = layer.weight
        rows, columns = reversed(weight.shape) if _are_transposed(layers) else weight.shape
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _bounded(options.rank, columns, largest=LARGEST_FACTOR)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _bounded(rows, options.rank, largest=LARGEST_FACTOR)
        if options.dora:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = _bounded(rows, largest=LARGEST_NORM)
    return {ADAPTER_WEIGHTS: tensors}


def _bounded(*shape: int, largest: float) -> SideTensor:
    return SideTensor(shape, -largest, largest, dtype="F32")


def target_layers(model: PreTrainedModel, options: LoraTraining) -> dict[str, nn.Module]:
    """Return the linear layers to adapt, by name; raises `UserError` if there are none, or for one that cannot be."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear | Conv1D)}
    if options.targets is None:
        layers = _usual_layers(model, linear)
    else:
        layers = _named_layers(linear, [target.strip() for target in options.targets.split(",")])
    for name, layer in layers.items():
        weight: Any = layer.weight
        if options.rank > min(weight.shape):
            sizes = " x ".join(map(str, weight.shape))
            raise UserError(f"rank {options.rank} exceeds the smaller side of '{name}' ({sizes}); lower it")
        if any(other.weight is weight for other in _embeddings(model)):
            raise UserError(
                f"'{name}' shares its matrix with the token embedding, which an adapter cannot change; leave it out of the targets"
            )
    if len({type(layer) is Conv1D for layer in layers.values()}) > 1:
        raise UserError("the targets are of two kinds, whose matrices are stored in different orders; choose one kind")
    return layers


def _usual_layers(model: PreTrainedModel, linear: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the linear layers of attention and feed-forward networks, which names in files decide."""
    stored = StoredNames(model)
    names = {name: stored.of(name) for name, _ in model.named_parameters()}
    model_type = model.config.model_type
    family = architecture_of(model_type, [file_name for file_names in names.values() for file_name in file_names])
    patterns = (*family.feed_forward, *family.attention)
    inside = {name for name, file_names in names.items() if all(_matches(other, patterns) for other in file_names)}
    fused = next((name for name, parameter in model.named_parameters() if name in inside and parameter.dim() > 2), None)
    if fused is not None:
        raise UserError(
            f"the experts of this mixture are one tensor ('{fused}'), which has no linear layers to adapt; name others, such as "
            "--option targets=q_proj,k_proj,v_proj,o_proj"
        )
    layers = {name: layer for name, layer in linear.items() if f"{name}.weight" in inside}
    if not layers:
        raise UserError(
            f"the attention and feed-forward layers of '{model_type}' are not known; name layers with --option targets=NAMES: "
            f"{_kinds(linear)}"
        )
    return layers


def _named_layers(linear: Mapping[str, nn.Module], targets: Iterable[str]) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for target in targets:
        matched = {name: layer for name, layer in linear.items() if _matches(name, (target, f"*.{target}"))}
        if not matched:
            raise UserError(f"no linear layer matches target '{target}'; the model has {_kinds(linear)}")
        layers |= matched
    return layers


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _embeddings(model: PreTrainedModel) -> list[Any]:
    from torch.nn import Embedding

    return [module for module in model.modules() if isinstance(module, Embedding)]


def _are_transposed(layers: Mapping[str, nn.Module]) -> bool:
    """Return whether the weights of the layers have shape (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(layer, Conv1D) for layer in layers.values())


def _kinds(names: Iterable[str]) -> str:
    """Return the last components of module names, which are the same in each decoder layer."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _shortest_names(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the last components of the layers' names if these name no other modules, otherwise the whole names."""
    kinds = {name.rpartition(".")[2] for name in layers}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in kinds}
    return sorted(kinds if named == set(layers) else layers)


@hookimpl
def trainers() -> list[Trainer]:
    return [
        Trainer(
            "lora",
            "a low-rank adapter of the frozen seed (LoRA, rsLoRA, DoRA), as a PEFT folder",
            prepare,
            LoraTraining,
            makes="adapter",
            require=require_lora,
            side_files=adapter_file,
            side_documents=adapter_config,
        ),
        Trainer(
            "qlora",
            "the same beside a seed whose linear layers are in 4 bits while it trains (QLoRA)",
            prepare_quantised,
            LoraTraining,
            makes="adapter",
            require=require_qlora,
            side_files=adapter_file,
            side_documents=adapter_config,
        ),
    ]
