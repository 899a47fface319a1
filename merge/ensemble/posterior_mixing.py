"""The `posterior` mixer: weights are the domain posterior of Branch-Train-Merge (arXiv:2208.03306, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.errors import UserError
from ...core.hooks.ensembles import MixingPass, TextMixer, TextState
from ...core.hooks.merging import BuiltModel, MergeInputs
from ...core.hooks.option_checks import check_top_k
from ...core.models.posterior import PosteriorKind, keep_top, log_posterior, updated_prior
from ...core.models.scoring import token_log_probs
from .prior import fit_prior

if TYPE_CHECKING:
    from torch import Tensor, nn

PriorKind = Literal["cached", "updating", "uniform", "given"]


@dataclass(frozen=True)
class PosteriorSettings:
    """Settings of a posterior mixer, as stored in an ensemble's configuration."""

    prior: tuple[float, ...]
    """Prior probability of each member."""
    prior_kind: PriorKind = "uniform"
    """Origin of the prior; an `updating` prior changes while text is scored."""
    posterior: PosteriorKind = "prefix"
    top_experts: int | None = None
    """Number of members with a weight, those with the largest prior; None for all."""


class PosteriorMixer(TextMixer):
    """Weights members by prior and evidence: the likelihood of the text so far under each of them."""

    def __init__(self, settings: PosteriorSettings) -> None:
        self._settings = settings
        self.begin_text()

    @property
    def active(self) -> Sequence[int]:
        """The members with a prior above 0; all with an updating prior, since the next one needs their evidence."""
        if self._settings.prior_kind == "updating":
            return range(len(self._settings.prior))
        return [index for index, share in enumerate(self._initial_prior().tolist()) if share > 0]

    def settings(self) -> dict[str, Any]:
        return {**asdict(self._settings), "prior": list(self._settings.prior)}

    def current(self) -> PosteriorMixer:
        if self._settings.prior_kind != "updating":
            return self.subset(self.active)
        return PosteriorMixer(replace(self._settings, prior=tuple(self.prior.tolist())))

    def subset(self, members: Sequence[int]) -> PosteriorMixer:
        shares = [self._settings.prior[member] for member in members]
        total, top_experts = sum(shares), self._settings.top_experts
        if not total > 0:
            raise UserError("no expert is left that has a weight; keep at least one")
        is_all = top_experts is None or top_experts >= len(shares)
        prior = tuple(share / total for share in shares)
        return PosteriorMixer(replace(self._settings, prior=prior, top_experts=None if is_all else top_experts))

    def begin_text(self) -> None:
        self.prior = self._initial_prior()[list(self.active)]
        """Prior of the active members, (K,)."""

    def begin(self, ids_BT: Tensor, mask_BT: Tensor | None, counts_BT: Tensor, state: TextState | None) -> MixingPass:
        evidence = state if isinstance(state, Evidence) else Evidence()
        return _PosteriorPass(self._log_prior(counts_BT), ids_BT, counts_BT, evidence, self._settings.posterior)

    def joint_log_probs(self, members: Sequence[nn.Module], tokens_BT1: Tensor, *, adapt: bool) -> Tensor:
        import torch

        scores_KBT = torch.stack([token_log_probs(member, tokens_BT1) for member in members])
        log_prior = self._log_prior(scores_KBT)
        if adapt and self._settings.prior_kind == "updating":
            self.prior = updated_prior(self.prior.to(scores_KBT.device), [scores_KBT], self._settings.posterior)
        return log_posterior(scores_KBT, log_prior, self._settings.posterior) + scores_KBT

    def _initial_prior(self) -> Tensor:
        """Return the prior of all members, without those beyond `top_experts` if it is constant."""
        import torch

        prior = torch.tensor(self._settings.prior, dtype=torch.float64)
        if self._settings.top_experts and self._settings.prior_kind != "updating":
            prior = keep_top(prior, self._settings.top_experts)
        return prior.float()

    def _log_prior(self, like: Tensor) -> Tensor:
        """Return the log prior, (K,); of an updating prior only the `top_experts` largest entries."""
        is_truncated = self._settings.prior_kind == "updating" and self._settings.top_experts is not None
        prior = keep_top(self.prior, self._settings.top_experts or 0) if is_truncated else self.prior
        return prior.to(like.device).log()


@dataclass(frozen=True)
class Evidence:
    """Each member's predictions for the texts of a batch so far."""

    log_likelihoods: tuple[Tensor, ...] = ()
    """Log-likelihood of the text so far, (B,) per member; empty before the first token."""
    next_log_probs: tuple[Tensor, ...] = ()
    """Log-probabilities of the next token, (B, V) per member."""

    def __len__(self) -> int:
        return len(self.log_likelihoods[0]) if self.log_likelihoods else 0

    def select_rows(self, rows: Sequence[int]) -> Evidence:
        return Evidence(
            tuple(tensor[list(rows)] for tensor in self.log_likelihoods),
            tuple(tensor[list(rows)] for tensor in self.next_log_probs),
        )


class _PosteriorPass(MixingPass):
    """The posterior weights of one forward pass."""

    def __init__(
        self, log_prior_K: Tensor, ids_BT: Tensor, counts_BT: Tensor, before: Evidence, kind: PosteriorKind
    ) -> None:
        self._log_prior_K, self._ids_BT, self._counts_BT = log_prior_K, ids_BT, counts_BT
        self._before, self._kind = before, kind
        self._evidence: list[Tensor] = []
        """Evidence after each token, (B, T) per member."""
        self._log_likelihoods: list[Tensor] = []
        self._next_log_probs: list[Tensor] = []

    def log_weights(self, member: int, log_probs_BTV: Tensor) -> Tensor:
        import torch

        token_log_probs_BT = torch.zeros_like(self._counts_BT)
        token_log_probs_BT[:, 1:] = log_probs_BTV[:, :-1].gather(-1, self._ids_BT[:, 1:, None]).squeeze(-1)
        if self._before.next_log_probs:
            token_log_probs_BT[:, :1] = self._before.next_log_probs[member].gather(-1, self._ids_BT[:, :1])
        token_log_probs_BT = token_log_probs_BT * self._counts_BT
        log_likelihoods_BT = token_log_probs_BT.cumsum(dim=1)
        if self._before.log_likelihoods:
            log_likelihoods_BT = log_likelihoods_BT + self._before.log_likelihoods[member][:, None]
        self._log_likelihoods.append(log_likelihoods_BT[:, -1])
        self._next_log_probs.append(log_probs_BTV[:, -1])
        self._evidence.append(log_likelihoods_BT if self._kind == "prefix" else token_log_probs_BT)
        return self._log_prior_K[member] + self._evidence[-1]

    def finish(self) -> tuple[Tensor, Tensor | None]:
        import torch

        joint_KBT = self._log_prior_K[:, None, None] + torch.stack(self._evidence)
        return joint_KBT.log_softmax(dim=0).permute(1, 2, 0), joint_KBT.logsumexp(dim=0)

    def state(self) -> Evidence:
        return Evidence(tuple(self._log_likelihoods), tuple(self._next_log_probs))


def read_posterior(settings: Mapping[str, Any], folder: Path | None) -> PosteriorMixer:
    """Restore a posterior mixer from its settings."""
    return PosteriorMixer(PosteriorSettings(**{**settings, "prior": tuple(settings["prior"])}))


@dataclass(frozen=True)
class PosteriorOptions:
    """Options of the `posterior` mixer."""

    posterior: PosteriorKind = "prefix"
    """Evidence of the posterior: the text so far (the paper) or only its last token (the released code)."""
    prior: PriorKind | None = None
    """Prior over experts. `cached`: fitted on validation text and frozen; `updating`: updated while text is
    scored; `given`: the merge's weights. Not set: `given` if the merge has weights, else `cached`."""
    top_k: int | None = None
    """Number of active experts, those with the largest prior; not set: all."""
    samples: int = 100
    """Number of validation blocks for fitting the cached prior."""


def fit_posterior(inputs: MergeInputs, options: PosteriorOptions) -> tuple[PosteriorMixer, BuiltModel]:
    """Return the mixer of some experts, its prior fitted if it is `cached`; raises `UserError` for contradictions."""
    kind = options.prior or ("given" if inputs.weights_given else "cached")
    count = len(inputs.experts)
    if inputs.weights_given and kind != "given":
        raise UserError(f"prior '{kind}' ignores the given weights; remove either the weights or the prior")
    check_top_k(options.top_k, count)
    if options.top_k is not None and kind == "uniform" and options.top_k < count:
        raise UserError(
            "top_k selects the experts with the largest prior, which a uniform prior does not rank; "
            "use prior: cached, updating or given"
        )
    if kind == "cached":
        prior = fit_prior(inputs, options.posterior, options.samples)
    else:
        prior = dict(inputs.weights) if kind == "given" else dict.fromkeys(inputs.experts, 1 / count)
    settings = PosteriorSettings(tuple(prior.values()), kind, options.posterior, options.top_k)
    return PosteriorMixer(settings), BuiltModel(prior)
