"""Dense merge methods from the literature: merge several models into one of the same architecture."""

from __future__ import annotations

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
from ...merge.dense.task_vectors.breadcrumbs import BreadcrumbsOptions, breadcrumbs, breadcrumbs_ties
from ...merge.dense.task_vectors.dare import DareOptions, dare_linear, dare_ties
from ...merge.dense.task_vectors.della import DellaOptions, della, della_linear
from ...merge.dense.task_vectors.nearswap import NearswapOptions, nearswap
from ...merge.dense.task_vectors.sce import SceOptions, sce
from ...merge.dense.task_vectors.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from ...merge.dense.task_vectors.ties import TiesOptions, ties


def _dense(name: str, summary: str, merge: Any, options: type, **fields: Any) -> MergeMethod:
    return TensorMerge(name, summary, merge=merge, options=options, arrays="any", **{"weights": "factors", **fields})


def _on_task_vectors(options: Any) -> bool:
    return bool(options.task_vectors)


def _from_seed(options: Any) -> bool:
    return bool(options.from_seed)


@hookimpl
def merge_methods() -> list[MergeMethod]:
    return [
        _dense(
            "linear",
            "weighted mean of models",
            linear,
            LinearOptions,
            uses_seed=False,
            elementwise=True,
            keeps_seed=False,
        ),
        _dense(
            "slerp",
            "spherical linear interpolation between two models",
            slerp,
            SlerpOptions,
            uses_seed=_from_seed,
            expert_count=(1, 2),
        ),
        _dense(
            "nuslerp",
            "weighted spherical interpolation between two models or task vectors",
            nuslerp,
            NuslerpOptions,
            uses_seed=_on_task_vectors,
            expert_count=(2, 2),
        ),
        _dense(
            "multislerp",
            "one-step spherical mean of several models",
            multislerp,
            MultislerpOptions,
            uses_seed=_on_task_vectors,
        ),
        _dense(
            "karcher",
            "Riemannian mean of several models on the sphere",
            karcher,
            KarcherOptions,
            uses_seed=False,
        ),
        _dense(
            "task_arithmetic",
            "seed plus weighted sum of task vectors",
            task_arithmetic,
            TaskArithmeticOptions,
            elementwise=True,
        ),
        _dense("ties", "seed plus trimmed task vectors with sign election", ties, TiesOptions),
        _dense("dare_linear", "seed plus randomly sparsified task vectors", dare_linear, DareOptions),
        _dense("dare_ties", "dare_linear with sign election", dare_ties, DareOptions),
        _dense("della", "della_linear with sign election", della, DellaOptions),
        _dense(
            "della_linear",
            "seed plus task vectors sparsified at random by magnitude",
            della_linear,
            DellaOptions,
        ),
        _dense(
            "breadcrumbs",
            "seed plus task vectors without smallest and largest elements",
            breadcrumbs,
            BreadcrumbsOptions,
        ),
        _dense(
            "breadcrumbs_ties",
            "breadcrumbs with sign election",
            breadcrumbs_ties,
            BreadcrumbsOptions,
        ),
        _dense(
            "sce",
            "seed plus high-variance elements of task vectors, weighted by their norms, with sign election",
            sce,
            SceOptions,
        ),
        _dense(
            "model_stock",
            "interpolation between seed and mean by the angle between task vectors",
            model_stock,
            ModelStockOptions,
            expert_count=(2, None),
        ),
        _dense(
            "nearswap",
            "interpolation towards an expert, weighted by closeness to the seed",
            nearswap,
            NearswapOptions,
            elementwise=True,
            expert_count=(1, 1),
        ),
        _dense(
            "passthrough",
            "copy of one model's tensors, for stacking layers",
            passthrough,
            PassthroughOptions,
            uses_seed=False,
            elementwise=True,
            keeps_seed=False,
            expert_count=(1, 1),
        ),
        _dense(
            "arcee_fusion",
            "seed plus the most important elements of one task vector",
            arcee_fusion,
            ArceeFusionOptions,
            expert_count=(1, 1),
        ),
        _dense(
            "fisher",
            "mean weighted by Fisher information (needs `expertctl stats --kind fisher`)",
            fisher,
            FisherOptions,
            weights="shares",
            uses_seed=False,
            statistics="fisher",
        ),
        _dense(
            "regmean",
            "least-squares fit to every expert's layer outputs (needs `expertctl stats --kind gram`)",
            regmean,
            RegmeanOptions,
            weights="shares",
            uses_seed=False,
            statistics="gram",
        ),
    ]
