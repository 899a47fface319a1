"""Compute the router of a changed mixture from the statistics that are stored with it.

Experts that stay are described by their statistics, so that only the text of new experts is read. Removing an expert
leaves no trace in the router: it has the bytes of a merge without the expert.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ...core.hooks.manager import installed_plugins
from ...core.hooks.mixtures import RouterInputs, RouterRows, RouterStart
from ...core.manifests.manifest import Manifest
from ...core.reporting import Reporter
from ..planning.assembly import ExpertParts
from ..planning.used_text import Validation
from .expert_models import ExpertModels
from .mixing import PUBLIC
from .opened import OpenedMixture
from .routing.stored_statistics import read_statistics


def refit_router(
    mixture: OpenedMixture,
    experts: Sequence[ExpertParts],
    new: Mapping[str, Manifest],
    validation: Validation,
    reporter: Reporter,
) -> RouterRows:
    """Return the rows, biases and statistics of the router of a mixture with other `experts`.

    `new` holds the manifests of those that the mixture does not contain. Raises `UserError` for one without text.
    """
    router = installed_plugins().offer(RouterStart, mixture.record.router.start)
    rows = mixture.router.rows
    return router.start(
        RouterInputs(
            seed=mixture.source.folder,
            experts={expert.name: None if expert.name == PUBLIC else mixture.source.folder for expert in experts},
            num_layers=rows.shape[0],
            width=rows.shape[2],
            options=mixture.options.router_options,
            validation=validation,
            domains={name: tuple(manifest.domains) for name, manifest in new.items()},
            expert_model=ExpertModels(mixture.record.dense, mixture.shared, experts),
            has_bias=mixture.options.bias == "carry",
            statistics={
                name: tensors for name, tensors in read_statistics(mixture.source.folder).items() if name not in new
            },
            reporter=reporter,
        )
    )


def fitted_domains(manifest: Manifest, removed: Collection[str], new: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the domains that the router of a mixture is fitted on after a change of experts.

    Those of `removed` experts are left out, unless another expert has them; `new` are the domains of new experts.
    """
    merged = manifest.merged
    assert merged is not None
    domains = {name: {*statement.domains, name} for name, statement in manifest.expert_data.items()}
    gone = {domain for name in removed for domain in domains.get(name, ())}
    kept = {domain for name, known in domains.items() if name not in removed for domain in known}
    return tuple(dict.fromkeys([*(domain for domain in merged.fitted_on if domain not in gone - kept), *new]))
