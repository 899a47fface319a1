"""Ensemble of experts as one transformers model (ELMforest of Branch-Train-Merge, arXiv:2208.03306).

`forward` returns the log-probabilities of the mixture as logits; `generate()` keeps a key-value cache per
expert. Shapes: K = active experts, B = batch, T = tokens, V = vocabulary.

On disk an ensemble is a folder with `config.json`, `experts/NAME.safetensors` (the tensors that each expert
changed) and, unless every expert changed all tensors, the seed's files in `seed/`. All of these are links to
existing files, so merging copies nothing. In memory, tensors shared with the seed are stored once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ...core.artefacts.files import write_json
from ...core.artefacts.model_config import with_floats
from ...core.artefacts.safetensors_io import Checkpoint, checkpoint_files, write_tensors
from ...core.errors import UserError
from ...core.hooks.ensembles import TextMixer, TextState
from ...core.models.adapters.prompts import (
    PROMPT_TENSOR,
    fixed_prompt,
    prompt_of,
    prompt_rows,
    prompt_tokens_of,
    with_prompt,
)
from ...core.models.decoding.uncached import UncachedGeneration
from ...core.models.loading import POSITION_LIMITS
from ...core.models.stored_names import StoredNames, stored_tensors
from ..sources.shared_settings import SHARED_SETTINGS
from .members_cache import MembersCache, can_cache
from .stored_mixer import stored_mixer

MODEL_TYPE = "expertctl_ensemble"
EXPERTS_FOLDER = "experts"
SEED_FOLDER = "seed"


class EnsembleConfig(PretrainedConfig):
    """Configuration of an ensemble: its experts and their mixer."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        member: Mapping[str, Any] | None = None,
        experts: Sequence[str] = (),
        mixer: str = "posterior",
        mixer_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.member = dict(member or {})
        """`config.json` of the seed, shared by all experts."""
        self.experts = list(experts)
        self.mixer = mixer
        """Name of the mixer that weights the experts."""
        self.mixer_settings = dict(mixer_settings or {})
        """`TextMixer.settings`."""
        for name in SHARED_SETTINGS:
            if name in self.member:
                kwargs.setdefault(name, self.member[name])
        super().__init__(**kwargs)

    @property
    def member_names(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(self.experts)


class EnsembleCache(MembersCache):
    """Key-value cache per member, and the mixer's state of the texts so far."""

    def __init__(self, members: Sequence[PreTrainedModel]) -> None:
        super().__init__(members)
        self.unread_tokens: list[Tensor | None] = [None] * len(members)
        """Tokens (B, t) that a member skipped because its weight was 0 in all rows."""
        self.text_state: TextState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        unread = self.unread_tokens[0]
        return super().get_seq_length(layer_idx) + (0 if unread is None else unread.shape[1])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.text_state is not None:
            self._select_rows(torch.arange(len(self.text_state)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("the cache of an ensemble cannot be cropped; generate without an assistant model")

    def can_append(self) -> bool:
        """Return whether rows can be appended: no member has skipped tokens, and the mixer's state can grow."""
        is_read = all(tokens is None for tokens in self.unread_tokens)
        return is_read and hasattr(self.text_state, "append_rows") and super().can_append()

    def append_rows(self, other: MembersCache) -> None:
        assert isinstance(other, EnsembleCache)
        super().append_rows(other)
        state: Any = self.text_state  # `can_append` was asked
        self.text_state = state.append_rows(other.text_state)

    def _select_rows(self, rows: Tensor) -> None:
        self.unread_tokens = [
            tensor if tensor is None else tensor.index_select(0, rows.to(tensor.device))
            for tensor in self.unread_tokens
        ]
        if self.text_state is not None:
            self.text_state = self.text_state.select_rows(rows.tolist())


@dataclass
class EnsembleOutput(ModelOutput):
    """Output of `forward`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    """Log-probabilities of the mixture, (B, T, V), float32."""
    past_key_values: EnsembleCache | None = None
    expert_weights: Tensor | None = None
    """p(expert | tokens up to and including t) of the active experts, (B, T, K)."""
    expert_log_probs: Tensor | None = None
    """Log-probabilities of the token after the last one under each active expert, (B, K, V), if requested."""


class EnsembleForCausalLM(PreTrainedModel, UncachedGeneration, GenerationMixin):
    """Ensemble of a seed's experts, mixed per token by a mixer such as the domain posterior."""

    config_class = EnsembleConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self, config: EnsembleConfig, members: Sequence[PreTrainedModel] | None = None, mixer: TextMixer | None = None
    ) -> None:
        super().__init__(config)
        self.mixer = mixer or stored_mixer(config.mixer, config.mixer_settings, None)
        self.active = list(self.mixer.active)
        """Indices of the experts that can have a weight; the others are not loaded."""
        if members is None:
            members = [_empty_member(config) for _ in self.active]
        self.members = nn.ModuleList(members)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates a cache per expert

    @property
    def expert_names(self) -> list[str]:
        """Names of the active experts, in the order of `members`."""
        return [self.config.experts[index] for index in self.active]

    @property
    def named_members(self) -> dict[str, PreTrainedModel]:
        """The active experts by name; each may be on a device of its own."""
        pairs = zip(self.expert_names, self.members, strict=True)
        return {name: cast("PreTrainedModel", member) for name, member in pairs}

    # --- inference ---

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        output_expert_log_probs: bool = False,
        **kwargs: Any,
    ) -> EnsembleOutput:
        """Return the mixture's log-probabilities for tokens (B, T), which may continue the text in a cache.

        `attention_mask` (B, past + T) is 0 for padding, which may be on either side. Experts with weight 0 do not run; their
        `expert_log_probs` are 0.
        """
        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        cache = past_key_values if isinstance(past_key_values, EnsembleCache) else None
        members = list(self.members)
        if cache is None and use_cache and can_cache(members):
            cache = EnsembleCache(members)
        continues = cache is not None and cache.get_seq_length() > 0
        if position_ids is None and attention_mask is not None:
            position_ids = _positions(attention_mask)[:, -input_ids.shape[1] :]
        counts_BT = _counts(input_ids, attention_mask, continues)

        mask_BT = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        mixing = self.mixer.begin(input_ids, mask_BT, counts_BT, cache.text_state if cache is not None else None)
        total: Tensor | None = None
        last_by_member: dict[int, Tensor] = {}
        waiting: dict[int, Tensor] = {}  # predictions of members whose weights depend on later ones
        for index, member in enumerate(members):
            if mixing.is_skipped(index, kept):
                if cache is not None:
                    cache.unread_tokens[index] = _append_tokens(cache.unread_tokens[index], input_ids)
                continue
            logits = _member_logits(member, index, input_ids, attention_mask, position_ids, cache)
            log_probs_BTV = logits.float().log_softmax(dim=-1).to(input_ids.device)
            log_weights_BT = mixing.log_weights(index, log_probs_BTV)
            if output_expert_log_probs:
                last_by_member[index] = log_probs_BTV[:, -1]
            log_probs_BTV = log_probs_BTV[:, -input_ids.shape[1] :][:, kept]
            if mixing.needs_all_members:
                waiting[index] = log_probs_BTV.clone()  # not a view of all positions
            else:
                total = _log_sum(total, log_weights_BT[:, kept, None] + log_probs_BTV)
        log_weights_BTK, log_sum_BT = mixing.finish()
        for index, log_probs_BTV in waiting.items():
            total = _log_sum(total, log_weights_BTK[:, kept, index, None] + log_probs_BTV)
        assert total is not None
        if log_sum_BT is not None:
            total = total - log_sum_BT[:, kept, None]
        if cache is not None:
            cache.text_state = mixing.state()
        loss = None
        if labels is not None:  # each is predicted from the tokens before it
            loss = torch.nn.functional.nll_loss(total[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        last_BKV = None
        if output_expert_log_probs:
            skipped = torch.zeros_like(next(iter(last_by_member.values())))
            last_BKV = torch.stack([last_by_member.get(index, skipped) for index in range(len(members))], dim=1)
        return EnsembleOutput(
            loss=loss,
            logits=total,
            past_key_values=cache,
            expert_weights=log_weights_BTK.exp(),
            expert_log_probs=last_BKV,
        )

    @property
    def text_domains(self) -> Sequence[str]:
        """Domains that `begin_text` may name."""
        return self.mixer.domains

    @property
    def learns_from_text(self) -> bool:
        """Whether scored texts change later weights."""
        return self.mixer.learns_from_text

    def begin_text(self, domain: str | None = None) -> None:
        """Forget the texts that were scored before, if they change later weights; the next are of one of the mixer's domains."""
        self.mixer.begin_text(domain)

    def target_log_probs(self, tokens_BT1: Tensor) -> Tensor:
        """Return log p(x_t | x_<t) for all but the first token, (B, T), without the full distribution.

        An `updating` prior is updated with this batch afterwards.
        """
        return self.mixer.joint_log_probs(list(self.members), tokens_BT1, adapt=True).logsumexp(dim=0)

    def responsibilities(self, tokens_BT1: Tensor) -> Tensor:
        """Return p(expert | tokens up to and including the target) for each target, (B, T, K)."""
        joint_KBT = self.mixer.joint_log_probs(list(self.members), tokens_BT1, adapt=False)
        return joint_KBT.softmax(dim=0).permute(1, 2, 0)

    def without(self, names: Collection[str]) -> EnsembleForCausalLM:
        """Return the ensemble without some experts; raises `UserError` if none with a weight is left."""
        kept = [place for place, name in enumerate(self.expert_names) if name not in names]
        mixer = self.mixer.subset([self.active[place] for place in kept])
        experts = [self.expert_names[place] for place in kept]
        members = [self.members[place] for place in kept]
        config = ensemble_config(self.config.member, experts, self.config.mixer, mixer, longest_prompt(members))
        return EnsembleForCausalLM(config, members, mixer)

    # --- files ---

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> EnsembleForCausalLM:
        """Load an ensemble folder; supports only the `dtype` and `device_map` options of transformers."""
        root = Path(folder)
        if not isinstance(config, EnsembleConfig):
            config = EnsembleConfig.from_pretrained(root)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
        mixer = stored_mixer(config.mixer, config.mixer_settings, root)
        members = _load_members(root, config, [config.experts[index] for index in mixer.active], dtype)
        model: EnsembleForCausalLM = cls(config, members, mixer).eval()
        device = kwargs.get("device_map")
        if isinstance(device, str | torch.device) and device != "auto":
            model.to(device)
        return model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a folder for `from_pretrained` with complete copies of all experts."""
        root = Path(save_directory)
        (root / EXPERTS_FOLDER).mkdir(parents=True, exist_ok=True)
        for name, member in zip(self.expert_names, self.members, strict=True):
            write_tensors(root / EXPERTS_FOLDER / f"{name}.safetensors", _tensors_of(member))
        mixer = self.mixer.current()
        mixer.write(root)
        prompt = longest_prompt(self.members)
        write_config(root, ensemble_config(self.config.member, self.expert_names, self.config.mixer, mixer, prompt))
        if self.generation_config is not None:
            self.generation_config.save_pretrained(root)


def _tensors_of(member: PreTrainedModel) -> dict[str, Tensor]:
    """Return a member's tensors by their names in files, with its prompt if it has one."""
    prompt = prompt_of(member)
    if prompt is None:
        return stored_tensors(member)
    own = {f"prompt.{name}" for name in prompt.state_dict()}
    tensors = {name: tensor for name, tensor in stored_tensors(member).items() if name not in own}
    return tensors | {PROMPT_TENSOR: prompt_rows(prompt, 1, member.device)[0]}


def longest_prompt(members: Iterable[Any]) -> int:
    """Return how many positions of the context are left for no text, since the prompt of a member may take them."""
    return max(map(prompt_tokens_of, members), default=0)


def _load_members(root: Path, config: EnsembleConfig, names: Iterable[str], dtype: Any) -> list[PreTrainedModel]:
    """Load experts; tensors of the seed are loaded once and shared between them."""
    seed = Checkpoint(checkpoint_files(root / SEED_FOLDER)) if (root / SEED_FOLDER).is_dir() else Checkpoint([])
    seed_tensors: dict[str, Tensor] = {}

    def read(checkpoint: Checkpoint, key: str) -> Tensor:
        tensor = checkpoint.read(key)
        if dtype in (None, "auto") or not tensor.is_floating_point():
            return tensor
        return tensor.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    members = []
    for name in names:
        path = root / EXPERTS_FOLDER / f"{name}.safetensors"
        if not path.is_file():
            raise UserError(f"{path} is missing; merge the ensemble again")
        checkpoint = Checkpoint([path])
        tensors = {key: read(checkpoint, key) for key in checkpoint}
        prompt = tensors.pop(PROMPT_TENSOR, None)
        for key in seed:
            if key not in tensors:
                if key not in seed_tensors:
                    seed_tensors[key] = read(seed, key)
                tensors[key] = seed_tensors[key]
        empty = _empty_member(config)
        for key in StoredNames(empty).missing_in(tensors):
            # transformers would initialise it with no more than a warning
            raise UserError(f"{root} has no tensor '{key}' for expert '{name}'; merge the ensemble again")
        kind = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
        member = type(empty).from_pretrained(None, config=_member_config(config), state_dict=tensors, dtype=kind)
        if prompt is not None:
            with_prompt(member, fixed_prompt(prompt))
        members.append(member.eval())
    return members


def write_config(folder: Path, config: EnsembleConfig) -> None:
    """Write `config.json`, with the class that `AutoModelForCausalLM` resolves."""
    config.architectures = [EnsembleForCausalLM.__name__]
    write_json(folder / "config.json", config.to_dict())


def _member_config(config: EnsembleConfig) -> PretrainedConfig:
    return AutoConfig.for_model(**with_floats(config.member))


def _empty_member(config: EnsembleConfig) -> PreTrainedModel:
    """Return a member on the meta device: shapes without storage."""
    with torch.device("meta"):
        member: PreTrainedModel = AutoModelForCausalLM.from_config(_member_config(config))
    return member


def _member_logits(
    member: PreTrainedModel,
    index: int,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: EnsembleCache | None,
) -> Tensor:
    """Return an expert's logits for the tokens that it skipped, which it reads first, and for these, (B, t + T, V).

    They are on the device of the expert.
    """
    unread = None if cache is None else cache.unread_tokens[index]
    if cache is not None and unread is not None:
        input_ids = _append_tokens(unread, input_ids)
        cache.unread_tokens[index] = None
        position_ids = None if attention_mask is None else _positions(attention_mask)[:, -input_ids.shape[1] :]
    device = member.device
    logits: Tensor = member(
        input_ids=input_ids.to(device),
        attention_mask=None if attention_mask is None else attention_mask.to(device),
        position_ids=None if position_ids is None else position_ids.to(device),
        past_key_values=cache.members[index] if cache is not None else None,
        use_cache=cache is not None,
    ).logits
    return logits


def _log_sum(total: Tensor | None, terms: Tensor) -> Tensor:
    return terms if total is None else torch.logaddexp(total, terms)


def _append_tokens(before_Bt: Tensor | None, after_BT: Tensor) -> Tensor:
    return after_BT if before_Bt is None else torch.cat([before_Bt, after_BT], dim=1)


def _positions(attention_mask: Tensor) -> Tensor:
    """Return the position of each token, not counting padding, (B, past + T)."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def _counts(input_ids: Tensor, attention_mask: Tensor | None, continues: bool) -> Tensor:
    """Return 1 for tokens that are predicted from a preceding token, else 0, float32 (B, T)."""
    batch, length = input_ids.shape
    counts = torch.ones(batch, length, device=input_ids.device)
    if not continues:
        counts[:, 0] = 0
    if attention_mask is not None:
        mask = attention_mask.to(counts)
        before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
        counts = counts * (mask * before)[:, -length:]
    return counts


def ensemble_config(
    member: Mapping[str, Any], experts: Iterable[str], name: str, mixer: TextMixer, prompt: int = 0
) -> EnsembleConfig:
    """Return the configuration of an ensemble; `member` is the seed's `config.json`, `name` the mixer's.

    `prompt` is the length of the longest prompt of a member, whose positions are not the text's.
    """
    config = EnsembleConfig(member=member, experts=list(experts), mixer=name, mixer_settings=mixer.settings())
    for limit in POSITION_LIMITS:
        if prompt and isinstance(member.get(limit), int):
            setattr(config, limit, member[limit] - prompt)
    return config
