"""The dense merge methods of the literature: one model out of several, tensor by tensor."""

from __future__ import annotations

from typing import Any

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.merging import MergeMethod
from ...merge.dense.averages.fisher import FisherOptions, fisher
from ...merge.dense.averages.linear import LinearOptions, linear
from ...merge.dense.averages.model_stock import ModelStockOptions, model_stock
from ...merge.dense.averages.passthrough import PassthroughOptions, passthrough
from ...merge.dense.averages.regmean import RegmeanOptions, regmean
from ...merge.dense.sphere.karcher import KarcherOptions, karcher
from ...merge.dense.sphere.multislerp import MultislerpOptions, multislerp
from ...merge.dense.sphere.nuslerp import NuslerpOptions, nuslerp
from ...merge.dense.sphere.slerp import SlerpOptions, slerp
from ...merge.dense.task_vectors.arcee_fusion import ArceeFusionOptions, arcee_fusion
from ...merge.dense.task_vectors.breadcrumbs import BreadcrumbsOptions, breadcrumbs, breadcrumbs_ties
from ...merge.dense.task_vectors.dare import DareOptions, dare_linear, dare_ties
from ...merge.dense.task_vectors.della import DellaOptions, della, della_linear
from ...merge.dense.task_vectors.nearswap import NearswapOptions, nearswap
from ...merge.dense.task_vectors.sce import SceOptions, sce
from ...merge.dense.task_vectors.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from ...merge.dense.task_vectors.ties import TiesOptions, ties


def _dense(name: str, summary: str, merge: Any, options: type, **how: Any) -> MergeMethod:
    return MergeMethod(
        name, summary, merge=merge, options=options, arrays="any", **{"weights": "factors", **how}
    )


def _on_task_vectors(options: Any) -> bool:
    return bool(options.task_vectors)


def _from_seed(options: Any) -> bool:
    return bool(options.from_seed)


@hookimpl
def merge_methods() -> list[MergeMethod]:
    return [
        _dense(
            "linear",
            "the weighted mean of models",
            linear,
            LinearOptions,
            uses_seed=False,
            elementwise=True,
            keeps_seed=False,
        ),
        _dense(
            "slerp",
            "between two models along the arc",
            slerp,
            SlerpOptions,
            uses_seed=_from_seed,
            expert_count=(1, 2),
        ),
        _dense(
            "nuslerp",
            "between two models along the arc, weighted, whole or row by row",
            nuslerp,
            NuslerpOptions,
            uses_seed=_on_task_vectors,
            expert_count=(2, 2),
        ),
        _dense(
            "multislerp",
            "a mean of several models on the sphere, in one step",
            multislerp,
            MultislerpOptions,
            uses_seed=_on_task_vectors,
        ),
        _dense(
            "karcher", "the mean of several models on the sphere", karcher, KarcherOptions, uses_seed=False
        ),
        _dense(
            "task_arithmetic",
            "the seed plus everything the experts learned",
            task_arithmetic,
            TaskArithmeticOptions,
            elementwise=True,
        ),
        _dense("ties", "the seed plus large changes that most experts agree on", ties, TiesOptions),
        _dense("dare_linear", "the seed plus changes thinned at random", dare_linear, DareOptions),
        _dense("dare_ties", "the same, of those that most experts agree on", dare_ties, DareOptions),
        _dense("della", "the seed plus changes thinned by magnitude that most agree on", della, DellaOptions),
        _dense("della_linear", "the seed plus changes thinned by magnitude", della_linear, DellaOptions),
        _dense("breadcrumbs", "the seed plus changes of middle size", breadcrumbs, BreadcrumbsOptions),
        _dense(
            "breadcrumbs_ties",
            "the same, of those that most experts agree on",
            breadcrumbs_ties,
            BreadcrumbsOptions,
        ),
        _dense(
            "sce", "the seed plus what experts differ in most, weighed by how far they moved", sce, SceOptions
        ),
        _dense(
            "model_stock",
            "between seed and mean, as far as the experts agree",
            model_stock,
            ModelStockOptions,
            expert_count=(2, None),
        ),
        _dense(
            "nearswap",
            "an expert's values where they are near the seed's",
            nearswap,
            NearswapOptions,
            elementwise=True,
            expert_count=(1, 1),
        ),
        _dense(
            "passthrough",
            "one model's tensors as they are, for stacking layers",
            passthrough,
            PassthroughOptions,
            uses_seed=False,
            elementwise=True,
            keeps_seed=False,
            expert_count=(1, 1),
        ),
        _dense(
            "arcee_fusion",
            "the changes of one expert that matter most",
            arcee_fusion,
            ArceeFusionOptions,
            expert_count=(1, 1),
        ),
        _dense(
            "fisher",
            "every element from the experts it matters to (needs `expertctl stats --kind fisher`)",
            fisher,
            FisherOptions,
            weights="shares",
            uses_seed=False,
            statistics="fisher",
        ),
        _dense(
            "regmean",
            "layers that fit every expert's own inputs (needs `expertctl stats --kind gram`)",
            regmean,
            RegmeanOptions,
            weights="shares",
            uses_seed=False,
            statistics="gram",
        ),
    ]
