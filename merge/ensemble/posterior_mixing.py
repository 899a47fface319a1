"""The `posterior` mixer: weights are the domain posterior of Branch-Train-Merge (arXiv:2208.03306, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.errors import UserError
from ...core.hooks.ensembles import MixingPass, TextMixer, TextState
from ...core.hooks.merging import BuiltModel, MergeInputs
from ...core.hooks.option_checks import check_at_least, check_top_k
from ...core.models.kernels.posterior import PosteriorKind, last_posterior, log_posterior, updated_prior
from ...core.models.scoring import token_log_probs
from .posterior_pass import Evidence, PosteriorPass
from .prior import fit_priors, mean_prior
from .top_experts import ChosenEvidence, TopExpertsPass, chosen_only

if TYPE_CHECKING:
    from torch import Tensor, nn

PriorKind = Literal["cached", "updating", "uniform", "given"]
EVERY = 16


@dataclass(frozen=True)
class PosteriorSettings:
    """Settings of a posterior mixer, as stored in an ensemble's configuration."""

    prior: tuple[float, ...]
    """Prior probability of each member for texts of unknown domains."""
    prior_kind: PriorKind = "uniform"
    """Origin of the prior; an `updating` prior changes while text is scored."""
    posterior: PosteriorKind = "prefix"
    top_experts: int | None = None
    """Number of members with a weight, those with the largest posterior; None for all."""
    domain_priors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Prior probability of each member for texts of known domains, by domain."""
    every: int = EVERY
    """Interval in tokens between choices of the `top_experts`; before the first one, all members have a weight."""


class PosteriorMixer(TextMixer):
    """Weights members by prior and evidence: the likelihood of the text so far under each of them.

    A text of unknown domain has the mean of the domains' priors. For `prefix` evidence, that is the same as weighting the
    domains' priors by the text so far, since the evidence depends on the member only.
    """

    def __init__(self, settings: PosteriorSettings) -> None:
        self._settings = settings
        self.begin_text()

    @property
    def active(self) -> Sequence[int]:
        """The members with a prior above 0; all with an updating prior, since the next one needs their evidence."""
        if self._settings.prior_kind == "updating":
            return range(len(self._settings.prior))
        return [index for index, share in enumerate(self._settings.prior) if share > 0]

    @property
    def domains(self) -> Sequence[str]:
        return tuple(self._settings.domain_priors)

    @property
    def learns_from_text(self) -> bool:
        return self._settings.prior_kind == "updating"

    @property
    def top_experts(self) -> int | None:
        """Number of members with a weight; None if all have one."""
        wanted = self._settings.top_experts
        return wanted if wanted is not None and wanted < len(self.prior) else None

    def settings(self) -> dict[str, Any]:
        priors = {domain: list(prior) for domain, prior in self._settings.domain_priors.items()}
        return {**asdict(self._settings), "prior": list(self._settings.prior), "domain_priors": priors}

    def current(self) -> PosteriorMixer:
        if self._settings.prior_kind != "updating":
            return self.subset(self.active)
        return PosteriorMixer(replace(self._settings, prior=tuple(self.prior.tolist())))

    def subset(self, members: Sequence[int]) -> PosteriorMixer:
        top_experts = self._settings.top_experts
        is_all = top_experts is None or top_experts >= len(members)
        priors = {domain: _restricted(prior, members) for domain, prior in self._settings.domain_priors.items()}
        return PosteriorMixer(
            replace(
                self._settings,
                prior=_restricted(self._settings.prior, members),
                top_experts=None if is_all else top_experts,
                domain_priors=priors,
            )
        )

    def begin_text(self, domain: str | None = None) -> None:
        import torch

        prior = self._settings.prior if domain is None else self._settings.domain_priors[domain]
        self.prior = torch.tensor(prior, dtype=torch.float64).float()[list(self.active)]
        """Prior of the active members, (K,)."""
        self._has_read = False

    def begin(self, ids_BT: Tensor, mask_BT: Tensor | None, counts_BT: Tensor, state: TextState | None) -> MixingPass:
        log_prior_K = self.prior.to(counts_BT.device).log()
        kind = self._settings.posterior
        if self.top_experts is None:
            evidence = state if isinstance(state, Evidence) else Evidence()
            return PosteriorPass(log_prior_K, ids_BT, counts_BT, evidence, kind)
        chosen = state if isinstance(state, ChosenEvidence) else None
        return TopExpertsPass(log_prior_K, ids_BT, counts_BT, chosen, kind, self.top_experts, self._settings.every)

    def joint_log_probs(self, members: Sequence[nn.Module], tokens_BT1: Tensor, *, adapt: bool) -> Tensor:
        import torch

        scores_KBT = torch.stack([token_log_probs(member, tokens_BT1) for member in members])
        prior_K, kind = self.prior.to(scores_KBT.device), self._settings.posterior
        log_weights_KBT = log_posterior(scores_KBT, prior_K.log(), kind)
        if self.top_experts is not None:
            counts_BT = torch.arange(scores_KBT.shape[-1], device=scores_KBT.device).expand(scores_KBT.shape[1:])
            is_choice_BT = (counts_BT > 0) & (counts_BT % self._settings.every == 0)
            log_weights_KBT, _ = chosen_only(log_weights_KBT, is_choice_BT, self.top_experts)
        if adapt and self._settings.prior_kind == "updating":
            posterior_K = last_posterior(scores_KBT, prior_K.log(), kind)
            self.prior = updated_prior(prior_K if self._has_read else None, posterior_K)
            self._has_read = True
        return log_weights_KBT + scores_KBT


def _restricted(prior: Sequence[float], members: Sequence[int]) -> tuple[float, ...]:
    """Return the prior of some members; raises `UserError` if they have none."""
    shares = [prior[member] for member in members]
    total = sum(shares)
    if not total > 0:
        raise UserError("no expert is left that has a weight; keep at least one")
    return tuple(share / total for share in shares)


def read_posterior(settings: Mapping[str, Any], folder: Path | None) -> PosteriorMixer:
    """Restore a posterior mixer from its settings."""
    priors = {domain: tuple(prior) for domain, prior in settings.get("domain_priors", {}).items()}
    return PosteriorMixer(PosteriorSettings(**{**settings, "prior": tuple(settings["prior"]), "domain_priors": priors}))


@dataclass(frozen=True)
class PosteriorOptions:
    """Options of the `posterior` mixer."""

    posterior: PosteriorKind = "prefix"
    """Evidence of the posterior: the text so far (the paper) or only its last token (the released code)."""
    prior: PriorKind | None = None
    """Prior over experts. `cached`: fitted on the validation text of each domain and frozen; `updating`: updated while text
    is scored; `given`: the merge's weights. Not set: `given` if the merge has weights, else `cached`."""
    top_k: int | None = None
    """Number of active experts, those with the largest posterior; not set: all."""
    every: int = EVERY
    """Interval in tokens between choices of the `top_k` experts."""
    samples: int = 100
    """Number of validation blocks of each domain for fitting its cached prior."""

    def __post_init__(self) -> None:
        check_at_least("every", self.every, 1)
        check_at_least("samples", self.samples, 1)


def fit_posterior(inputs: MergeInputs, options: PosteriorOptions) -> tuple[PosteriorMixer, BuiltModel]:
    """Return the mixer of some experts, its prior fitted if it is `cached`; raises `UserError` for contradictions."""
    kind = options.prior or ("given" if inputs.weights_given else "cached")
    count = len(inputs.experts)
    if inputs.weights_given and kind != "given":
        raise UserError(f"prior '{kind}' ignores the given weights; remove either the weights or the prior")
    check_top_k(options.top_k, count)
    priors: dict[str, dict[str, float]] = {}
    if kind == "cached":
        priors = fit_priors(inputs, options.posterior, options.samples)
        prior = mean_prior(priors)
    else:
        prior = dict(inputs.weights) if kind == "given" else dict.fromkeys(inputs.experts, 1 / count)
    domain_priors = {domain: tuple(by_expert.values()) for domain, by_expert in priors.items()}
    settings = PosteriorSettings(
        tuple(prior.values()), kind, options.posterior, options.top_k, domain_priors, options.every
    )
    return PosteriorMixer(settings), BuiltModel(prior)
