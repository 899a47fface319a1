"""A stitched model: frozen experts beside a frozen hub, joined by stitch layers (arXiv:2502.00075).

On disk it is a folder with `config.json`, `stitches.safetensors`, and for each member a folder that it refers to, or, made
self-contained, holds under `members/`. Shapes: B = batch, T = tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...core.artefacts.files import write_json
from ...core.artefacts.safetensors_io import Checkpoint, write_tensors
from ...core.errors import UserError
from ..ensemble.members_cache import MembersCache
from .configuration import StitchedConfig
from .layers import ExpertsIntoHub, HubIntoExperts, Stitch
from .points import hub_points, joins_hub, matched_points
from .stepwise import Stepwise, decoder_layers, first_of

STITCHES_FILE = "stitches.safetensors"
HUB = "hub"


class StitchedForCausalLM(PreTrainedModel, GenerationMixin):
    """A hub whose states and those of its experts reach one another at a few depths; the hub's head speaks."""

    config_class = StitchedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self, config: StitchedConfig, hub: PreTrainedModel, experts: Mapping[str, PreTrainedModel]
    ) -> None:
        super().__init__(config)
        self.hub = hub
        self.experts = nn.ModuleList(experts.values())
        self.expert_names = list(experts)
        """Those that run; `without` takes some out."""
        self.points = hub_points(len(decoder_layers(hub)), config.num_stitches)
        self._expert_points = {
            name: matched_points(self.points, name, len(decoder_layers(expert)))
            for name, expert in experts.items()
        }
        self.stitches = new_stitches(config)
        for member in (hub, *self.experts):
            member.requires_grad_(False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave everything as it was made: members are loaded, stitches begin as `new_stitches` has them."""

    def train(self, mode: bool = True) -> StitchedForCausalLM:
        """Set the stitches to training; members are frozen and stay as they are when used."""
        super().train(mode)
        for member in (self.hub, *self.experts):
            member.eval()
        return self

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own, one for each member

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
        """Return the hub's logits for tokens (B, T), which may go on from a cache."""
        cache = past_key_values if isinstance(past_key_values, MembersCache) else None
        if cache is None and use_cache:
            cache = MembersCache(1 + len(self.experts))
        if position_ids is None and attention_mask is not None:
            places = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
            position_ids = places[:, -input_ids.shape[1] :]

        def inputs(number: int) -> dict[str, Any]:
            return {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": cache.members[number] if cache is not None else None,
                "use_cache": cache is not None,
            }

        passes = {
            name: Stepwise(expert) for name, expert in zip(self.expert_names, self.experts, strict=True)
        }
        for number, one in enumerate(passes.values(), start=1):
            one.begin(**inputs(number))
        hooks = self._stitched_to(passes)
        try:
            output = self.hub(**inputs(0), labels=labels, logits_to_keep=logits_to_keep)
        finally:
            for hook in hooks:
                hook.remove()
        return CausalLMOutputWithPast(loss=output.loss, logits=output.logits, past_key_values=cache)

    def _stitched_to(self, passes: Mapping[str, Stepwise]) -> list[Any]:
        """Let the hub's layers before each stitch hand their states through it; return the hooks that do."""
        layers = decoder_layers(self.hub)
        return [
            layers[point - 1].register_forward_hook(self._hook(number, passes))
            for number, point in enumerate(self.points)
        ]

    def _hook(self, number: int, passes: Mapping[str, Stepwise]) -> Any:
        stitch = self.stitches[number]

        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            hub = first_of(output)
            states = {name: one.advance(self._expert_points[name][number]) for name, one in passes.items()}
            if isinstance(stitch, ExpertsIntoHub):
                hub, projected = stitch(hub, states)
                changed = projected if self.config.projected and number + 1 < len(self.stitches) else {}
            else:
                changed = stitch(hub, states)
            for name, one in changed.items():
                passes[name].states = one
            return (hub, *output[1:]) if isinstance(output, tuple) else hub

        return hook

    # --- files ---

    @classmethod
    def from_pretrained(
        cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> StitchedForCausalLM:
        """Load a stitched folder and the members that it refers to; takes transformers' `dtype` and `device_map`."""
        from .members import load_members

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
        """Read the stitches of a folder; raises `UserError` where one is missing or has another shape."""
        own = dict(self.stitches.named_parameters(prefix="stitches"))
        stored = Checkpoint([folder / STITCHES_FILE])
        for name in sorted(own.keys() ^ set(stored)):
            raise UserError(
                f"tensor '{name}' is in {'the model' if name in own else folder / STITCHES_FILE} only; merge it again"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                tensor = stored.read(name)
                if tensor.shape != parameter.shape:
                    raise UserError(
                        f"tensor '{name}' in {folder / STITCHES_FILE} is {list(tensor.shape)}, and its members need "
                        f"{list(parameter.shape)}"
                    )
                parameter.copy_(tensor)

    def drop(self, gone: Collection[str]) -> None:
        """Close the gates of experts: they run no more, and are not there for what is saved."""
        kept = [number for number, name in enumerate(self.expert_names) if name not in gone]
        self.experts = nn.ModuleList(self.experts[number] for number in kept)
        self.expert_names = [self.expert_names[number] for number in kept]
        for stitch in self.stitches:
            assert isinstance(stitch, Stitch)
            stitch.drop(gone)
        self.config.members = [one for one in self.config.members if one["name"] not in gone]

    def save_trained(self, folder: Path, base: Path) -> None:
        """Write stitches that were trained from those in `base`, with the same members."""
        from .members import move_members

        config = StitchedConfig.from_dict(self.config.to_dict())
        config.members = move_members(config.members, base, folder)
        write_stitches(folder, self.stitches)
        write_config(folder, config)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a folder that holds every member whole and refers to nothing outside."""
        from .members import embedded_members

        root = Path(save_directory)
        root.mkdir(parents=True, exist_ok=True)
        members = {HUB: self.hub, **dict(zip(self.expert_names, self.experts, strict=True))}
        config = StitchedConfig.from_dict(self.config.to_dict())
        config.members = embedded_members(root, members)
        write_stitches(root, self.stitches)
        write_config(root, config)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(root)


def new_stitches(config: StitchedConfig) -> nn.ModuleList:
    """Return stitch layers at their start, where the hub is as it was."""
    found = nn.ModuleList()
    for number in range(config.num_stitches):
        kind = ExpertsIntoHub if joins_hub(number, config.num_stitches) else HubIntoExperts
        stitch = kind(config.members[0]["width"], config.expert_widths, config.dropout)
        stitch.start_anew()
        found.append(stitch)
    return found


def write_stitches(folder: Path, stitches: nn.ModuleList) -> None:
    """Write stitch layers as `stitches.safetensors`."""
    own = dict(stitches.named_parameters(prefix="stitches"))
    write_tensors(folder / STITCHES_FILE, {name: one.detach().to("cpu") for name, one in own.items()})


def write_config(folder: Path, config: StitchedConfig) -> None:
    """Write `config.json`, with the class that `AutoModelForCausalLM` resolves."""
    config.architectures = [StitchedForCausalLM.__name__]
    write_json(folder / "config.json", config.to_dict())
