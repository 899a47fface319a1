"""Closed-form router: ridge regression of expert labels on hidden states (DUME, arXiv:2603.29765).

Shapes: L = layers, E = experts, d = hidden size, N = tokens, P = d (d + 1) / 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError
from ....core.hooks.mixtures import RouterInputs, RouterRows
from .expert_text import domains_of_expert, domains_of_seed, validation_blocks
from .starts import options_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

NAME = "ridge"
Statistics = Mapping[str, "NDArray[Any]"]
"""Sums over the tokens of one expert's text: `products` (L, P), the upper triangle of X^T X row by row, `sums` (L, d), the
column sums of X, and `tokens` (1,)."""


def ridge_rows(inputs: RouterInputs) -> RouterRows:
    """Return rows that predict for every hidden state which expert's text it belongs to, as unit vectors.

    X are the inputs of a layer's router while every token of an expert's text is routed to this expert; a router with
    biases gets a column of ones. The rows solve (X^T X + lambda I) W = X^T Y, with the experts of the tokens as one-hot
    labels Y and lambda = `ridge` times the mean of the diagonal of X^T X. Each column of W is divided by its norm, and by
    `temperature`. Both products are sums over experts, so the statistics of `inputs.statistics` are used as they are.
    They are stored with the mixture unless `store` is 0. The seed's expert gets a row of 0 if there is no text for it.
    Raises `UserError` for an expert without text.
    """
    import numpy as np

    options = _options(inputs)
    statistics = {name: sums for name, sums in inputs.statistics.items() if name in inputs.experts}
    statistics |= _measure_others(inputs, statistics, int(options["samples"]))
    labelled = [name for name in inputs.experts if name in statistics]
    weights, offsets = solve_ridge([statistics[name] for name in labelled], options["ridge"], has_bias=inputs.has_bias)
    rows = np.zeros((inputs.num_layers, len(inputs.experts), inputs.width), np.float32)
    biases = np.zeros(rows.shape[:2], np.float32)
    places = [list(inputs.experts).index(name) for name in labelled]
    rows[:, places] = weights / options["temperature"]
    biases[:, places] = offsets / options["temperature"]
    stored = {name: statistics[name] for name in labelled} if options["store"] else {}
    return RouterRows(rows, biases if inputs.has_bias else None, statistics=stored)


def _options(inputs: RouterInputs) -> dict[str, Any]:
    options = options_of(inputs, {"samples": 64, "ridge": 1e-4, "temperature": 0.1, "store": 1}, NAME)
    for key in ("ridge", "temperature"):
        if not options[key] > 0:
            raise UserError(f"option '{key}' of router start '{NAME}' is {options[key]}; it must be greater than 0")
    if options["samples"] < 1:
        raise UserError(f"option 'samples' of router start '{NAME}' is {options['samples']}; it must be at least 1")
    return options


def _measure_others(inputs: RouterInputs, known: Mapping[str, Statistics], samples: int) -> dict[str, Statistics]:
    """Return the statistics of all experts that have none, on `samples` blocks of text each."""
    from ....core.models.feed_forwards import spread_blocks

    # the seed's expert of an earlier mixture stays as it was: with statistics, or with a row of 0
    unmeasured = [
        name
        for name, folder in inputs.experts.items()
        if name not in known and not (inputs.statistics and folder is None)
    ]
    if not unmeasured:
        return {}
    texts = validation_blocks(inputs)
    domains = {name: _domains(inputs, texts, name) for name in unmeasured}
    measured: dict[str, Statistics] = {}
    for name, chosen in domains.items():
        count = max(samples // max(len(chosen), 1), 1)
        blocks = [block for domain in chosen for block in spread_blocks(texts[domain], count)]
        if not chosen:
            inputs.reporter.say(
                f"'{name}' gets a router row of 0, because there is no text for it; name domains of such text with --fit-on"
            )
            continue
        measured[name] = measure_expert(inputs.expert_model(name), blocks)
        tokens = int(measured[name]["tokens"][0])
        inputs.reporter.say(f"hidden states of '{name}': {tokens:,} tokens of {', '.join(chosen)}")
    return measured


def _domains(inputs: RouterInputs, texts: Mapping[str, Any], name: str) -> list[str]:
    if inputs.experts[name] is None:
        return domains_of_seed(inputs, texts, name)
    return domains_of_expert(inputs, texts, name, NAME)


def measure_expert(model: PreTrainedModel, blocks: Sequence[NDArray[Any]]) -> Statistics:
    """Return the statistics of the inputs of a model's feed-forward networks on token arrays (tokens,), as float32."""
    import numpy as np

    from ....core.models.feed_forwards import input_moments

    moments = input_moments(model, blocks, full=True)
    second_Ldd, mean_Ld = moments.second.numpy(), moments.mean.numpy()
    upper = np.triu_indices(second_Ldd.shape[-1])
    return {
        "products": (second_Ldd[:, upper[0], upper[1]] * moments.tokens).astype(np.float32),
        "sums": (mean_Ld * moments.tokens).astype(np.float32),
        "tokens": np.array([moments.tokens]),
    }


def solve_ridge(statistics: Sequence[Statistics], ridge: float, *, has_bias: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return unit rows (L, E, d) and their biases (L, E), 0 without `has_bias`, in float64.

    A column of W that is 0 stays 0.
    """
    import numpy as np

    num_layers, width = statistics[0]["sums"].shape
    rows = np.empty((num_layers, len(statistics), width))
    biases = np.zeros(rows.shape[:2])
    for layer in range(num_layers):
        products, sums = _normal_equations(statistics, layer, has_bias=has_bias)
        scale = np.trace(products[:width, :width]) / width
        products[np.diag_indices_from(products)] += ridge * scale
        solution = np.linalg.solve(products, sums)
        norms = np.linalg.norm(solution[:width], axis=0)
        solution /= np.where(norms > 0, norms, 1)
        rows[layer] = solution[:width].T
        if has_bias:
            biases[layer] = solution[width]
    return rows, biases


def _normal_equations(
    statistics: Sequence[Statistics], layer: int, *, has_bias: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return X^T X (d, d) and X^T Y (d, E) of one layer in float64, with a last row for the biases if there are some."""
    import numpy as np

    sums = np.stack([expert["sums"][layer] for expert in statistics], axis=1).astype(np.float64)
    width = len(sums)
    upper = np.triu_indices(width)
    products = np.zeros((width, width))
    for expert in statistics:
        products[upper] += expert["products"][layer]
    products = products + np.triu(products, 1).T
    if has_bias:
        tokens = np.array([[float(expert["tokens"][0]) for expert in statistics]])
        column = sums.sum(axis=1, keepdims=True)
        products = np.block([[products, column], [column.T, tokens.sum(keepdims=True)]])
        sums = np.concatenate([sums, tokens])
    return products, sums
