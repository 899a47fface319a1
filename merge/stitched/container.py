"""Stitched model: a frozen hub and frozen experts, connected by stitch layers (arXiv:2502.00075).

On disk it is a folder with `config.json` and `stitches.safetensors`. The members are referenced by path or,
if self-contained, stored in `members/`. Shapes: B = batch, T = tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...core.artefacts.files import write_json
from ...core.artefacts.safetensors_io import Checkpoint, write_tensors
from ...core.errors import UserError
from ...core.models.decoding.uncached import UncachedGeneration
from ..ensemble.members_cache import MembersCache, can_cache
from .configuration import StitchedConfig, hub_points, leads_into_hub, matched_points
from .layer_probe import output_forms
from .layers import ExpertsIntoHub, HubIntoExperts, Stitch
from .members import load_members, move_members, write_members
from .stepwise import OutputForm, Stepwise, decoder_layers, hidden_states_of

STITCHES_FILE = "stitches.safetensors"
HUB = "hub"


class StitchedForCausalLM(PreTrainedModel, UncachedGeneration, GenerationMixin):
    """Hub and experts that exchange hidden states at stitch layers; logits come from the hub's LM head."""

    config_class = StitchedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: StitchedConfig, hub: PreTrainedModel, experts: Mapping[str, PreTrainedModel]) -> None:
        super().__init__(config)
        self.hub = hub
        self.experts = nn.ModuleList(experts.values())
        self.expert_names = list(experts)
        """Names of the active experts; `without` removes some."""
        self.points = hub_points(len(decoder_layers(hub)), config.num_stitches)
        self._expert_points = {
            name: matched_points(self.points, name, len(decoder_layers(expert))) for name, expert in experts.items()
        }
        self._forms = dict(zip(experts, output_forms(experts.values()), strict=True))
        self.stitches = new_stitches(config)
        for member in (hub, *self.experts):
            member.requires_grad_(False)
        self.post_init()

    @property
    def named_members(self) -> dict[str, PreTrainedModel]:
        """The hub and the active experts by name; each may be on a device of its own."""
        pairs = zip((HUB, *self.expert_names), (self.hub, *self.experts), strict=True)
        return {name: cast("PreTrainedModel", member) for name, member in pairs}

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise nothing: members are loaded, and `new_stitches` initialises the stitches."""

    def train(self, mode: bool = True) -> StitchedForCausalLM:
        """Set the mode of the stitches; members stay in evaluation mode."""
        super().train(mode)
        for member in (self.hub, *self.experts):
            member.eval()
        return self

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates a cache per member

    def get_input_embeddings(self) -> nn.Module:
        return cast("nn.Module", self.hub.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        return cast("nn.Module", self.hub.get_output_embeddings())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MembersCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the hub's logits for tokens (B, T), which may continue the text in a cache."""
        cache = past_key_values if isinstance(past_key_values, MembersCache) else None
        members = (self.hub, *self.experts)
        if cache is None and use_cache and can_cache(members):
            cache = MembersCache(members)
        if position_ids is None and attention_mask is not None:
            positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
            position_ids = positions[:, -input_ids.shape[1] :]

        def inputs(number: int) -> dict[str, Any]:
            device = members[number].device
            return {
                "input_ids": input_ids.to(device),
                "attention_mask": None if attention_mask is None else attention_mask.to(device),
                "position_ids": None if position_ids is None else position_ids.to(device),
                "past_key_values": cache.members[number] if cache is not None else None,
                "use_cache": cache is not None,
            }

        passes = {
            name: Stepwise(expert, self._forms[name])
            for name, expert in zip(self.expert_names, self.experts, strict=True)
        }
        for number, stepwise in enumerate(passes.values(), start=1):
            stepwise.begin(**inputs(number))
        layers = decoder_layers(self.hub)
        with ExitStack() as hooks:
            for number, point in enumerate(self.points):
                hooks.callback(layers[point - 1].register_forward_hook(self._hook(number, passes)).remove)
            output = self.hub(**inputs(0), labels=labels, logits_to_keep=logits_to_keep)
        return CausalLMOutputWithPast(loss=output.loss, logits=output.logits, past_key_values=cache)

    def _hook(self, number: int, passes: Mapping[str, Stepwise]) -> Any:
        """Return the hook of the hub layer before a stitch, which applies the stitch to the layer's output."""
        stitch = self.stitches[number]

        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            hub = hidden_states_of(output)
            states = {
                name: stepwise.advance(self._expert_points[name][number]).to(hub.device)
                for name, stepwise in passes.items()
            }
            if isinstance(stitch, ExpertsIntoHub):
                hub, projected = stitch(hub, states)
                changed = projected if self.config.projected and number + 1 < len(self.stitches) else {}
            else:
                changed = stitch(hub, states)
            for name, new_states in changed.items():
                passes[name].states = new_states.to(passes[name].states.device)
            form = OutputForm.of(output)
            return hub if form.container is None else form.container([hub, *output[1:]])

        return hook

    # --- files ---

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> StitchedForCausalLM:
        """Load a stitched model and its members; supports `dtype` and `device_map` of transformers."""
        root = Path(folder)
        if not isinstance(config, StitchedConfig):
            config = StitchedConfig.from_pretrained(root)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
        hub, experts = load_members(root, config, dtype)
        model: StitchedForCausalLM = cls(config, hub, experts)
        model.load_stitches(root)
        model.stitches.to(hub.dtype)
        device = kwargs.get("device_map")
        if isinstance(device, str | torch.device) and device != "auto":
            model.to(device)
        model.eval()
        return model

    def load_stitches(self, folder: Path) -> None:
        """Load the stitches of a folder; raises `UserError` if a tensor is missing or has another shape."""
        parameters = dict(self.stitches.named_parameters(prefix="stitches"))
        stored = Checkpoint([folder / STITCHES_FILE])
        for name in sorted(parameters.keys() ^ set(stored)):
            place = "the model" if name in parameters else folder / STITCHES_FILE
            raise UserError(f"tensor '{name}' is in {place} only; merge again")
        with torch.no_grad():
            for name, parameter in parameters.items():
                tensor = stored.read(name)
                if tensor.shape != parameter.shape:
                    raise UserError(
                        f"tensor '{name}' in {folder / STITCHES_FILE} has shape {list(tensor.shape)}, and "
                        f"the members need {list(parameter.shape)}; merge again"
                    )
                parameter.copy_(tensor)

    def without(self, disabled: Collection[str]) -> StitchedForCausalLM:
        """Remove experts from the model in place, and from what it saves, and return it."""
        kept = [number for number, name in enumerate(self.expert_names) if name not in disabled]
        self.experts = nn.ModuleList(self.experts[number] for number in kept)
        self.expert_names = [self.expert_names[number] for number in kept]
        for stitch in self.stitches:
            assert isinstance(stitch, Stitch)
            stitch.drop(disabled)
        self.config.members = [member for member in self.config.members if member["name"] not in disabled]
        return self

    def save_trained(self, folder: Path, base: Path) -> None:
        """Write trained stitches to `folder`, with the members of the model in `base`."""
        self._write(folder, move_members(self.config.members, base, folder))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a self-contained folder with a complete copy of every member."""
        root = Path(save_directory)
        root.mkdir(parents=True, exist_ok=True)
        self._write(root, write_members(root, self.named_members))
        if self.generation_config is not None:
            self.generation_config.save_pretrained(root)

    def _write(self, folder: Path, members: list[dict[str, Any]]) -> None:
        config = StitchedConfig.from_dict(self.config.to_dict())
        config.members = members
        write_stitched(folder, config, self.stitches)


def new_stitches(config: StitchedConfig) -> nn.ModuleList:
    """Return initialised stitch layers, with which the model equals the hub."""
    stitches = nn.ModuleList()
    for number in range(config.num_stitches):
        layer_class = ExpertsIntoHub if leads_into_hub(number, config.num_stitches) else HubIntoExperts
        stitch = layer_class(config.members[0]["width"], config.expert_widths, config.dropout)
        stitch.reset()
        stitches.append(stitch)
    return stitches


def write_stitched(folder: Path, config: StitchedConfig, stitches: nn.ModuleList) -> None:
    """Write `stitches.safetensors`, and `config.json` with the class that `AutoModelForCausalLM` resolves."""
    tensors = {name: parameter.detach().to("cpu") for name, parameter in stitches.named_parameters(prefix="stitches")}
    write_tensors(folder / STITCHES_FILE, tensors)
    config.architectures = [StitchedForCausalLM.__name__]
    # transformers keeps the folder that a model was loaded from, which says nothing about the model
    write_json(folder / "config.json", config.to_dict() | {"_name_or_path": ""})
