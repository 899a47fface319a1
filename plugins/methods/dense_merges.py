"""Dense merge methods from the literature: merge several models into one of the same architecture."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.merging import MergeMethod, TensorMerge
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
from ...merge.dense.task_vectors.breadcrumbs import BreadcrumbsOptions, breadcrumbs
from ...merge.dense.task_vectors.dare import DareOptions, dare
from ...merge.dense.task_vectors.della import DellaOptions, della
from ...merge.dense.task_vectors.nearswap import NearswapOptions, nearswap
from ...merge.dense.task_vectors.ram import RamOptions, RamPlusOptions, ram, ram_plus
from ...merge.dense.task_vectors.sce import SceOptions, sce
from ...merge.dense.task_vectors.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from ...merge.dense.task_vectors.ties import TIES_SURVEY, TiesOptions, ties


def _dense(merge: Any, options: type, summary: str, name: str | None = None, **fields: Any) -> MergeMethod:
    """Return a merge method with the name of its function, unless another is given."""
    return TensorMerge(
        name or merge.__name__, summary, merge=merge, options=options, arrays="any", **{"weights": "factors", **fields}
    )


@hookimpl
def merge_methods() -> list[MergeMethod]:
    return [
        _dense(linear, LinearOptions, "weighted mean of models", uses_seed=False, elementwise=True, keeps_seed=False),
        _dense(
            slerp,
            SlerpOptions,
            "spherical linear interpolation between two models",
            uses_seed=attrgetter("from_seed"),
            expert_count=(1, 2),
        ),
        _dense(
            nuslerp,
            NuslerpOptions,
            "weighted spherical interpolation between two models or task vectors",
            uses_seed=attrgetter("task_vectors"),
            expert_count=(2, 2),
        ),
        _dense(
            multislerp,
            MultislerpOptions,
            "one-step spherical mean of several models",
            uses_seed=attrgetter("task_vectors"),
        ),
        _dense(karcher, KarcherOptions, "Riemannian mean of several models on the sphere", uses_seed=False),
        _dense(task_arithmetic, TaskArithmeticOptions, "seed plus weighted sum of task vectors", elementwise=True),
        _dense(ties, TiesOptions, "seed plus trimmed task vectors with sign election", survey=TIES_SURVEY),
        _dense(partial(dare, elect=False), DareOptions, "seed plus randomly sparsified task vectors", "dare_linear"),
        _dense(partial(dare, elect=True), DareOptions, "dare_linear with sign election", "dare_ties"),
        _dense(partial(della, elect=True), DellaOptions, "della_linear with sign election", "della"),
        _dense(
            partial(della, elect=False),
            DellaOptions,
            "seed plus task vectors sparsified at random by magnitude",
            "della_linear",
        ),
        _dense(
            partial(breadcrumbs, elect=False),
            BreadcrumbsOptions,
            "seed plus task vectors without smallest and largest elements",
            "breadcrumbs",
        ),
        _dense(
            partial(breadcrumbs, elect=True), BreadcrumbsOptions, "breadcrumbs with sign election", "breadcrumbs_ties"
        ),
        _dense(
            sce,
            SceOptions,
            "seed plus high-variance elements of task vectors, weighted by their norms, with sign election",
        ),
        _dense(
            ram,
            RamOptions,
            "seed plus the mean task vector of the experts that changed an element",
            elementwise=True,
        ),
        _dense(
            ram_plus,
            RamPlusOptions,
            "ram with amplified elements that only one expert changed",
            "ramplus_tl",
        ),
        _dense(
            model_stock,
            ModelStockOptions,
            "interpolation between seed and mean by the angle between task vectors",
            expert_count=(2, None),
        ),
        _dense(
            nearswap,
            NearswapOptions,
            "interpolation towards an expert, weighted by closeness to the seed",
            elementwise=True,
            expert_count=(1, 1),
        ),
        _dense(
            passthrough,
            PassthroughOptions,
            "copy of one model's tensors, for stacking layers",
            uses_seed=False,
            elementwise=True,
            keeps_seed=False,
            expert_count=(1, 1),
        ),
        _dense(
            arcee_fusion,
            ArceeFusionOptions,
            "seed plus the most important elements of one task vector",
            expert_count=(1, 1),
        ),
        _dense(
            fisher,
            FisherOptions,
            "mean weighted by Fisher information (needs `expertctl stats --kind fisher`)",
            weights="shares",
            uses_seed=False,
            statistics="fisher",
        ),
        _dense(
            regmean,
            RegmeanOptions,
            "least-squares fit to every expert's layer outputs (needs `expertctl stats --kind gram`)",
            weights="shares",
            uses_seed=False,
            statistics="gram",
        ),
    ]
