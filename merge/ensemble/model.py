"""Ensemble of experts as one transformers model (ELMforest of Branch-Train-Merge, arXiv:2208.03306).

`forward` returns the log-probabilities of the mixture as logits; `generate()` keeps a key-value cache per
expert. Shapes: K = active experts, B = batch, T = tokens, V = vocabulary.

On disk an ensemble is a folder with `config.json`, `experts/NAME.safetensors` (the tensors that each expert
changed) and, unless every expert changed all tensors, the seed's files in `seed/`. All of these are links to
existing files, so merging copies nothing. In memory, tensors shared with the seed are stored once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.generic import ModelOutput

from ...core.artefacts.files import read_json, write_json
from ...core.artefacts.safetensors_io import Checkpoint, checkpoint_files, write_tensors
from ...core.errors import UserError
from ...core.models.loading import checkpoint_tensors
from ...core.models.posterior import PosteriorKind, keep_top, log_posterior, mixture_log_probs, updated_prior
from ...core.models.scoring import token_log_probs
from ..sources.shared_settings import SHARED_SETTINGS
from .cluster_router import ClusterRouter, RoutedText, routing_from_json
from .members_cache import MembersCache

MODEL_TYPE = "expertctl_ensemble"
EXPERTS_FOLDER = "experts"
SEED_FOLDER = "seed"


class EnsembleConfig(PretrainedConfig):
    """Configuration of an ensemble: its experts, prior and posterior or router."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        member: Mapping[str, Any] | None = None,
        experts: Sequence[str] = (),
        prior: Sequence[float] = (),
        prior_kind: str = "uniform",
        posterior: PosteriorKind = "prefix",
        top_experts: int | None = None,
        router: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.member = dict(member or {})
        """`config.json` of the seed, shared by all experts."""
        self.experts = list(experts)
        self.prior = list(prior)
        """Prior probability of each expert, in the order of `experts`."""
        self.prior_kind = prior_kind
        """Origin of the prior; an `updating` prior changes while text is scored."""
        self.posterior = posterior
        self.top_experts = top_experts
        """Number of active experts, by prior; None for all. `top_k` is a generation setting."""
        self.router = dict(router) if router is not None else None
        """`ClusterRouting` if a cluster router replaces prior and posterior, else None."""
        for name in SHARED_SETTINGS:
            if name in self.member:
                kwargs.setdefault(name, self.member[name])
        super().__init__(**kwargs)


class EnsembleCache(MembersCache):
    """Key-value cache and log-likelihood of the text so far per expert."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.scores: list[Tensor | None] = [None] * num_experts
        """Log-likelihood of the text so far, (B,) per expert."""
        self.last_log_probs: list[Tensor | None] = [None] * num_experts
        """Log-probabilities of the next token, (B, V) per expert."""
        self.unread_tokens: list[Tensor | None] = [None] * num_experts
        """Tokens (B, t) that an expert skipped because its weight was 0 in all rows."""
        self.routed: list[RoutedText] | None = None
        """Routing state of each row with a cluster router, else None."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        unread = self.unread_tokens[0]
        return super().get_seq_length(layer_idx) + (0 if unread is None else unread.shape[1])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.scores = [_repeat_rows(tensor, repeats) for tensor in self.scores]
        self.last_log_probs = [_repeat_rows(tensor, repeats) for tensor in self.last_log_probs]
        self.unread_tokens = [_repeat_rows(tensor, repeats) for tensor in self.unread_tokens]
        if self.routed is not None:
            self.routed = [text for text in self.routed for _ in range(repeats)]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("the cache of an ensemble cannot be cropped; generate without an assistant model")

    def _select_rows(self, rows: Tensor) -> None:
        self.scores = [_take_rows(tensor, rows) for tensor in self.scores]
        self.last_log_probs = [_take_rows(tensor, rows) for tensor in self.last_log_probs]
        self.unread_tokens = [_take_rows(tensor, rows) for tensor in self.unread_tokens]
        if self.routed is not None:
            self.routed = [self.routed[row] for row in rows.tolist()]


def _repeat_rows(tensor: Tensor | None, repeats: int) -> Tensor | None:
    return None if tensor is None else tensor.repeat_interleave(repeats, dim=0)


def _take_rows(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.index_select(0, rows.to(tensor.device))


@dataclass
class EnsembleOutput(ModelOutput):
    """Output of `forward`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    """Log-probabilities of the mixture, (B, T, V), float32."""
    past_key_values: EnsembleCache | None = None
    expert_weights: Tensor | None = None
    """p(expert | tokens up to and including t) of the active experts, (B, T, K)."""


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """Ensemble of a seed's experts, mixed per token by the domain posterior or by a cluster router."""

    config_class = EnsembleConfig
    prior: Tensor
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: EnsembleConfig,
        members: Sequence[PreTrainedModel] | None = None,
        router: ClusterRouter | None = None,
    ) -> None:
        super().__init__(config)
        self.router = router
        """Cluster router that replaces prior and posterior, or None."""
        self.active = active_experts(config)
        """Indices of the active experts: all, or the `top_experts` with the largest prior."""
        if members is None:
            members = [_empty_member(config) for _ in self.active]
        self.members = nn.ModuleList(members)
        prior = _initial_prior(config)[self.active]
        self.register_buffer("prior", prior, persistent=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates a cache per expert

    @property
    def expert_names(self) -> list[str]:
        """Names of the active experts, in the order of `members`."""
        return [self.config.experts[index] for index in self.active]

    # --- inference ---

    def _log_prior(self) -> Tensor:
        """Return the log prior, (K,); of an updating prior only the `top_experts` largest entries."""
        is_truncated = self.config.prior_kind == "updating" and self.config.top_experts is not None
        prior: Tensor = keep_top(self.prior, self.config.top_experts) if is_truncated else self.prior
        return prior.log()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> EnsembleOutput:
        """Return the mixture's log-probabilities for tokens (B, T), which may continue the text in a cache.

        `attention_mask` (B, past + T) is 0 for padding, which may be on either side.
        """
        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        cache = past_key_values if isinstance(past_key_values, EnsembleCache) else None
        if cache is None and use_cache:
            cache = EnsembleCache(len(self.members))
        continues = cache is not None and cache.get_seq_length() > 0
        if position_ids is None and attention_mask is not None:
            position_ids = _positions(attention_mask)[:, -input_ids.shape[1] :]
        counts_BT = _counts(input_ids, attention_mask, continues)

        if self.router is not None:
            mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
            texts = cache.routed if cache is not None else None
            weights_BTK, routed = self.router(input_ids, mask, texts)
            if cache is not None:
                cache.routed = routed
        else:
            weights_BTK = None
        log_prior_K = self._log_prior()
        evidence = []
        total: Tensor | None = None
        for index, member in enumerate(self.members):
            if weights_BTK is not None and bool((weights_BTK[:, kept, index] == -torch.inf).all()):
                if cache is not None:
                    cache.unread_tokens[index] = _append_tokens(cache.unread_tokens[index], input_ids)
                continue
            logits = _member_logits(member, index, input_ids, attention_mask, position_ids, cache)
            log_probs_BTV = logits.float().log_softmax(dim=-1)
            if weights_BTK is not None:
                weighted = weights_BTK[:, kept, index, None] + log_probs_BTV[:, kept]
            else:
                evidence_BT = self._update_evidence(log_probs_BTV, input_ids, counts_BT, cache, index)
                evidence.append(evidence_BT)
                weighted = (log_prior_K[index] + evidence_BT[:, kept, None]) + log_probs_BTV[:, kept]
            total = weighted if total is None else torch.logaddexp(total, weighted)
        assert total is not None
        if weights_BTK is None:
            joint_KBT = log_prior_K[:, None, None] + torch.stack(evidence)
            total = total - joint_KBT.logsumexp(dim=0)[:, kept, None]
            weights_BTK = joint_KBT.log_softmax(dim=0).permute(1, 2, 0)
        return EnsembleOutput(
            loss=None if labels is None else _loss(total, labels),
            logits=total,
            past_key_values=cache,
            expert_weights=weights_BTK.exp(),
        )

    def _update_evidence(
        self,
        log_probs_BTV: Tensor,
        input_ids: Tensor,
        counts_BT: Tensor,
        cache: EnsembleCache | None,
        index: int,
    ) -> Tensor:
        """Return one expert's evidence (log-likelihood) after each token, (B, T), and update the cache."""
        token_log_probs_BT = torch.zeros_like(counts_BT)
        token_log_probs_BT[:, 1:] = log_probs_BTV[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        before = None if cache is None else cache.last_log_probs[index]
        if before is not None:
            token_log_probs_BT[:, :1] = before.gather(-1, input_ids[:, :1])
        token_log_probs_BT = token_log_probs_BT * counts_BT
        log_likelihoods_BT = token_log_probs_BT.cumsum(dim=1)
        if cache is not None:
            score = cache.scores[index]
            if score is not None:
                log_likelihoods_BT = log_likelihoods_BT + score[:, None]
            cache.scores[index] = log_likelihoods_BT[:, -1]
            cache.last_log_probs[index] = log_probs_BTV[:, -1]
        return log_likelihoods_BT if self.config.posterior == "prefix" else token_log_probs_BT

    def begin_text(self) -> None:
        """Reset an `updating` prior; other priors are constant."""
        self.prior = _initial_prior(self.config)[self.active].to(self.prior.device)

    def target_log_probs(self, tokens_BT1: Tensor) -> Tensor:
        """Return log p(x_t | x_<t) for all but the first token, (B, T), without the full distribution.

        An `updating` prior is updated with this batch afterwards.
        """
        if self.router is not None:
            return self._routed_log_probs(tokens_BT1).logsumexp(dim=0)
        scores_KBT = torch.stack([token_log_probs(member, tokens_BT1) for member in self.members])
        log_prior = self._log_prior()
        if self.config.prior_kind == "updating":
            self.prior = updated_prior(self.prior, [scores_KBT], self.config.posterior)
        return mixture_log_probs(scores_KBT, log_prior, self.config.posterior)

    def responsibilities(self, tokens_BT1: Tensor) -> Tensor:
        """Return p(expert | tokens up to and including the target) for each target, (B, T, K)."""
        if self.router is not None:
            return self._routed_log_probs(tokens_BT1).softmax(dim=0).permute(1, 2, 0)
        scores_KBT = torch.stack([token_log_probs(member, tokens_BT1) for member in self.members])
        joint_KBT = log_posterior(scores_KBT, self._log_prior(), self.config.posterior) + scores_KBT
        return joint_KBT.softmax(dim=0).permute(1, 2, 0)

    def _routed_log_probs(self, tokens_BT1: Tensor) -> Tensor:
        """Return log(weight_k p_k(x_t | x_<t)), (K, B, T); experts with weight 0 everywhere are skipped."""
        assert self.router is not None
        joint_KBT = self.router(tokens_BT1[:, :-1])[0].permute(2, 0, 1).contiguous()
        for index, member in enumerate(self.members):
            if not bool((joint_KBT[index] == -torch.inf).all()):
                joint_KBT[index] += token_log_probs(member, tokens_BT1)
        return joint_KBT

    # --- files ---

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> EnsembleForCausalLM:
        """Load an ensemble folder; supports only the `dtype` and `device_map` options of transformers."""
        root = Path(folder)
        if not isinstance(config, EnsembleConfig):
            config = EnsembleConfig.from_pretrained(root)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
        loader = _MemberLoader(root, config, dtype)
        members = [loader.load(config.experts[index]) for index in active_experts(config)]
        router = ClusterRouter.read(root, routing_from_json(config.router)) if config.router else None
        model: EnsembleForCausalLM = cls(config, members, router).eval()
        device = kwargs.get("device_map")
        if isinstance(device, str | torch.device) and device != "auto":
            model.to(device)
        return model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a folder for `from_pretrained` with complete copies of all experts."""
        root = Path(save_directory)
        (root / EXPERTS_FOLDER).mkdir(parents=True, exist_ok=True)
        for name, member in zip(self.expert_names, self.members, strict=True):
            write_tensors(root / EXPERTS_FOLDER / f"{name}.safetensors", checkpoint_tensors(member))
        config = EnsembleConfig.from_dict(self.config.to_dict())
        config.experts, config.prior = self.expert_names, self.prior.tolist()
        if config.prior_kind != "updating":
            config.top_experts = None  # inactive experts are not saved
        if self.router is not None:
            self.router.write(root)
        write_config(root, config)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(root)


class _MemberLoader:
    """Loads experts one by one; tensors of the seed are shared between them."""

    def __init__(self, root: Path, config: EnsembleConfig, dtype: Any) -> None:
        self._root, self._config, self._dtype = root, config, dtype
        seed = root / SEED_FOLDER
        self._seed = Checkpoint(checkpoint_files(seed)) if seed.is_dir() else None
        self._shared: dict[str, Tensor] = {}

    def load(self, name: str) -> PreTrainedModel:
        path = self._root / EXPERTS_FOLDER / f"{name}.safetensors"
        if not path.is_file():
            raise UserError(f"{path} is missing; merge the ensemble again")
        checkpoint = Checkpoint([path])
        tensors = {key: self._cast(checkpoint.read(key)) for key in checkpoint}
        for key in self._seed or ():
            if key not in tensors:
                tensors[key] = self._seed_tensor(key)
        empty = _empty_member(self._config)
        for key in sorted(checkpoint_tensors(empty).keys() - tensors.keys()):
            # transformers would initialise it with no more than a warning
            raise UserError(f"{self._root} has no tensor '{key}' for expert '{name}'; merge the ensemble again")
        config = _member_config(self._config)
        dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
        member: PreTrainedModel = type(empty).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        return member.eval()

    def _seed_tensor(self, name: str) -> Tensor:
        assert self._seed is not None
        if name not in self._shared:
            self._shared[name] = self._cast(self._seed.read(name))
        return self._shared[name]

    def _cast(self, tensor: Tensor) -> Tensor:
        if self._dtype in (None, "auto") or not tensor.is_floating_point():
            return tensor
        dtype = getattr(torch, self._dtype) if isinstance(self._dtype, str) else self._dtype
        return tensor.to(dtype)


def write_config(folder: Path, config: EnsembleConfig) -> None:
    """Write `config.json`, with the class that `AutoModelForCausalLM` resolves."""
    config.architectures = [EnsembleForCausalLM.__name__]
    write_json(folder / "config.json", config.to_dict())


def active_experts(config: EnsembleConfig) -> list[int]:
    """Return the indices of the active experts.

    `top_experts` restricts a constant prior, so the other experts need not run. With an updating prior all
    experts run, since the next prior is computed from their evidence.
    """
    if config.prior_kind == "updating":
        return list(range(len(config.experts)))
    return [index for index, share in enumerate(_initial_prior(config).tolist()) if share > 0]


def _initial_prior(config: EnsembleConfig) -> Tensor:
    prior = torch.tensor(config.prior, dtype=torch.float32)
    if config.top_experts and config.prior_kind != "updating":
        return keep_top(prior, config.top_experts)
    return prior


def _member_config(config: EnsembleConfig) -> PretrainedConfig:
    from transformers import AutoConfig

    settings = dict(config.member)
    kind = settings.pop("model_type")
    return AutoConfig.for_model(kind, **settings)


def _empty_member(config: EnsembleConfig) -> PreTrainedModel:
    """Return a member on the meta device: shapes without storage."""
    with torch.device("meta"):
        member: PreTrainedModel = AutoModelForCausalLM.from_config(_member_config(config))
    return member


def _member_logits(
    member: nn.Module,
    index: int,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: EnsembleCache | None,
) -> Tensor:
    """Return an expert's logits for the tokens, (B, T, V); it reads the tokens that it skipped first."""
    num_new = input_ids.shape[1]
    unread = None if cache is None else cache.unread_tokens[index]
    if cache is not None and unread is not None:
        input_ids = _append_tokens(unread, input_ids)
        cache.unread_tokens[index] = None
        position_ids = None if attention_mask is None else _positions(attention_mask)[:, -input_ids.shape[1] :]
    logits: Tensor = member(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache.members[index] if cache is not None else None,
        use_cache=cache is not None,
    ).logits[:, -num_new:]
    return logits


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


def _loss(mixture_BTV: Tensor, labels: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the labels, each predicted from the tokens before it."""
    return torch.nn.functional.nll_loss(mixture_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def ensemble_config(
    seed: Path,
    experts: Iterable[str],
    prior: Sequence[float],
    prior_kind: str,
    posterior: PosteriorKind,
    top_k: int | None,
    router: Mapping[str, Any] | None = None,
) -> EnsembleConfig:
    """Return the configuration of an ensemble of a seed's experts."""
    return EnsembleConfig(
        member=read_json(seed / "config.json"),
        experts=list(experts),
        prior=list(prior),
        prior_kind=prior_kind,
        posterior=posterior,
        top_experts=top_k,
        router=router,
    )
