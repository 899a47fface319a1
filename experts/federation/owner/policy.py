"""An owner's policy: what requests it carries out, written by the owner in `policy.yaml` of its state folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ....core.artefacts.files import write_text
from ....core.config.settings import DpConfig, Section, TrainingConfig, validate_settings
from ....core.config.yaml_lines import parse_yaml
from ....core.errors import UserError
from ..protocol.requests import ExpertRequest

POLICY_FILE = "policy.yaml"
GIGABYTE = 10**9
TEMPLATE = """\
# Requests beyond these limits are refused without asking; a line that is commented out sets no limit.
# recipes: [flexolmo]        # trainers that may be asked for
# rounds: false              # take part in rounds of a shared model
# max_tokens: 100_000_000    # training tokens of one request
# max_hours: 48              # hours that training for one request may take
# max_seed_gb: 20            # size of the seed to download
# max_memory_gb: 32          # memory of the training process
# max_parallel: 1            # requests that are trained at a time
# epsilon: 8                 # requests need differential privacy with at most this budget
# delta: 1.0e-6
"""

Limit = Annotated[float, Field(gt=0)] | None


class OwnerPolicy(Section):
    """Limits on the requests that an owner carries out; None sets none."""

    recipes: tuple[str, ...] | None = None
    """Names of the trainers that may be asked for."""
    rounds: bool = True
    """Whether to take part in rounds of a shared model."""
    max_tokens: Limit = None
    """Largest number of training tokens of one request."""
    max_hours: Limit = None
    """Most hours that training for one request may take."""
    max_seed_gb: Limit = None
    """Largest seed to download."""
    max_memory_gb: Limit = None
    """Memory limit of the training process."""
    max_parallel: Annotated[int, Field(ge=1)] = 1
    """Most requests that are trained at a time."""
    epsilon: Limit = None
    """Largest privacy budget; requests without differential privacy are refused."""
    delta: Limit = None

    def objection(self, request: ExpertRequest, privacy: DpConfig | None) -> str | None:
        """Return why a request exceeds the policy, or None; `privacy` is what it would be trained with."""
        recipe = request.recipe
        if self.recipes is not None and recipe.trains not in self.recipes:
            return f"your policy allows {', '.join(self.recipes)}, and the request asks for '{recipe.trains}'"
        if recipe.round is not None and not self.rounds:
            return f"your policy excludes rounds, and the request is for {recipe.round}"
        training = training_of(request)
        tokens, seed_bytes = (
            max(training.tokens, training.trained_tokens),
            sum(file.size for file in request.seed_files),
        )
        if self.max_tokens is not None and tokens > self.max_tokens:
            return f"the request trains on {tokens:,} tokens; your policy allows {self.max_tokens:,.0f}"
        if self.max_seed_gb is not None and seed_bytes > self.max_seed_gb * GIGABYTE:
            return f"the seed has {seed_bytes / GIGABYTE:.1f} GB; your policy allows {self.max_seed_gb:g}"
        for name, limit in (("epsilon", self.epsilon), ("delta", self.delta)):
            if limit is not None and (privacy is None or getattr(privacy, name) > limit):
                spent = "no differential privacy" if privacy is None else f"{name} {getattr(privacy, name):g}"
                return f"the request has {spent}; your policy demands {name} of at most {limit:g}"
        return None


def read_policy(state: Path) -> OwnerPolicy:
    """Read the policy in a state folder, without limits if there is none; raises `UserError` for an invalid one."""
    path = state / POLICY_FILE
    content = parse_yaml(path)[0] if path.is_file() else None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} has to hold names and values, such as max_hours: 48")
    return validate_settings(OwnerPolicy, content or {}, str(path))


def write_policy_template(state: Path) -> None:
    """Write a policy without limits, which says how to set them, unless there is one."""
    if not (state / POLICY_FILE).exists():
        write_text(state / POLICY_FILE, TEMPLATE)


def training_of(request: ExpertRequest) -> TrainingConfig:
    """Return a request's training settings, defaults included; raises `UserError` for invalid ones."""
    return validate_settings(TrainingConfig, dict(request.recipe.training), "the training of the request")


def describe(request: ExpertRequest, privacy: DpConfig | None) -> str:
    """Return a line with what a request asks for."""
    training, round_ = training_of(request), request.recipe.round
    steps = round_.steps if round_ is not None else training.steps
    amount = f"{steps:,} steps of {training.tokens_per_step:,} tokens"
    noise = "no differential privacy" if privacy is None else f"epsilon {privacy.epsilon:g}, delta {privacy.delta:g}"
    what = f"{round_} with " if round_ is not None else ""
    size = sum(file.size for file in request.seed_files)
    return (
        f"{what}{request.recipe.trains}, {amount}, {noise}, a seed of {size:,} bytes, until "
        f"{request.deadline:%Y-%m-%d %H:%M} UTC"
    )
