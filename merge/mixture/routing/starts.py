"""Router initialisations: random, uniform, from the experts' router rows, or from validation text.

Shapes: L = layers, E = experts, d = hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError
from ....core.hooks.mixtures import RouterInputs, RouterRows
from .expert_text import domains_of_expert, validation_blocks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROUTER_FILE = "router.safetensors"
"""File of `rows` (L, d), `biases` (L,) and mean hidden states `domain` and `public` (L, d) of an expert."""


def options_of(inputs: RouterInputs, defaults: Mapping[str, Any], router: str) -> dict[str, Any]:
    """Return a router start's options merged into its defaults; raises `UserError` for an unknown option."""
    for key, value in inputs.options.items():
        if key not in defaults:
            raise UserError(f"router start '{router}' has no option '{key}'; it has {', '.join(defaults) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"option '{key}' of router start '{router}' is {value!r}; it must be a number")
    return {**defaults, **inputs.options}


def random_rows(inputs: RouterInputs) -> RouterRows:
    """Return normally distributed rows (Branch-Train-MiX, arXiv:2403.07816, section 2.2).

    The standard deviation is 0.02 by default. An expert's row depends only on `seed` and its name, not on the
    other experts in the mixture.
    """
    options = options_of(inputs, {"seed": 0, "deviation": 0.02}, "random")
    return _draw_rows(
        inputs, options["seed"], lambda generator, shape: generator.standard_normal(shape) * options["deviation"]
    )


def linear_rows(inputs: RouterInputs) -> RouterRows:
    """Return rows uniform in [-b, b], b = 1 / sqrt(d), as `torch.nn.Linear`; each depends on `seed` and its name."""
    options = options_of(inputs, {"seed": 0}, "linear")
    bound = inputs.width**-0.5
    return _draw_rows(inputs, options["seed"], lambda generator, shape: generator.uniform(-bound, bound, shape))


def _draw_rows(
    inputs: RouterInputs, seed: float, draw: Callable[[np.random.Generator, tuple[int, int]], NDArray[Any]]
) -> RouterRows:
    import numpy as np

    rows = np.empty((inputs.num_layers, len(inputs.experts), inputs.width), np.float32)
    for number, name in enumerate(inputs.experts):
        key = hashlib.sha256(f"{int(seed)}:{name}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))
        rows[:, number] = draw(generator, (inputs.num_layers, inputs.width))
    return RouterRows(rows)


def uniform_rows(inputs: RouterInputs) -> RouterRows:
    """Return rows of 0: all experts have equal logits, and top-k selects the first ones."""
    import numpy as np

    options_of(inputs, {}, "uniform")
    return RouterRows(np.zeros((inputs.num_layers, len(inputs.experts), inputs.width), np.float32))


def embedding_rows(inputs: RouterInputs) -> RouterRows:
    """Return the rows and biases of the experts, 0 for the seed (FlexOlmo, arXiv:2507.07024, section 3.3.2).

    Option `scale` multiplies them: rows are trained against the public expert only, and the softmax over more
    experts is flatter than over two.
    """
    import numpy as np

    scale = float(options_of(inputs, {"scale": 1.0}, "embedding")["scale"])
    shape = (inputs.num_layers, len(inputs.experts), inputs.width)
    rows, biases = np.zeros(shape, np.float32), np.zeros(shape[:2], np.float32)
    units, can_fold = np.zeros(shape, np.float32), True
    for number, (name, folder) in enumerate(inputs.experts.items()):
        if folder is None:
            continue
        start = read_router_start(folder, name, scale)
        if start.rows.shape != (shape[0], 1, shape[2]):
            raise UserError(
                f"the router rows of '{name}' have shape {[shape[0], start.rows.shape[-1]]}; the seed needs "
                f"{[shape[0], shape[2]]}"
            )
        assert start.biases is not None
        rows[:, number], biases[:, number] = start.rows[:, 0], start.biases[:, 0]
        if start.unit is None:
            can_fold = False
        else:
            units[:, number] = start.unit[:, 0]
    return RouterRows(rows, biases, units if can_fold else None)


def read_router_start(folder: Path, name: str, scale: float) -> RouterRows:
    """Read a router row (L, 1, d) and bias (L, 1), times `scale`; raises `UserError` if it is missing or not finite."""
    import numpy as np

    from ....core.artefacts.safetensors_io import Checkpoint
    from ....core.manifests.manifest import find_manifest
    from ...engine.reading import Reader
    from ...sources.models import StoredTensor

    path = folder / ROUTER_FILE
    if not path.is_file():
        raise UserError(
            f"expert '{name}' ({folder}) has no router row ({ROUTER_FILE}); train it with --trains "
            "flexolmo, or choose another router initialisation, such as --option router=hidden"
        )
    manifest = find_manifest(folder)
    expected = manifest.tensors if manifest is not None else {}
    with Reader() as reader:
        tensors = {
            key: reader.read(StoredTensor(entry, expected.get(key)))
            for key, entry in Checkpoint([path]).entries.items()
        }
    for key in ("rows", "biases"):
        if key not in tensors:
            raise UserError(f"{path} has no tensor '{key}'; train the expert again with --trains flexolmo")
        if not np.isfinite(tensors[key]).all():
            raise UserError(f"the router {key} of expert '{name}' ({path}) are not finite; train it again")
    unit = None
    if "public" in tensors:
        mean = tensors["public"]
        unit = (mean / (mean**2).sum(axis=-1, keepdims=True))[:, None]
    return RouterRows(tensors["rows"][:, None] * scale, tensors["biases"][:, None] * scale, unit)


def hidden_rows(inputs: RouterInputs) -> RouterRows:
    """Return linear discriminants (LDA) of the hidden states of each expert's validation text.

    Row e is S^-1 (m_e - m), with m_e the mean hidden state of the expert's domains, m the mean over experts
    and S the pooled within-domain covariance. The biases are those of Gaussians of equal covariance. The
    seed's expert gets a row of 0. Raises `UserError` for an expert without validation text of its domain.
    """
    import numpy as np
    import torch

    from ....core.models.feed_forwards import InputMoments, input_moments, spread_blocks
    from ....core.models.loading import load_model

    options = options_of(inputs, {"samples": 64, "ridge": 1e-3}, "hidden")
    texts = validation_blocks(inputs)
    model, _ = load_model(inputs.seed, dtype="float32")
    moments: dict[int, InputMoments] = {}
    for number, (name, folder) in enumerate(inputs.experts.items()):
        if folder is None:
            continue
        domains = domains_of_expert(inputs, texts, name, "hidden")
        blocks = [block for domain in domains for block in spread_blocks(texts[domain], int(options["samples"]))]
        moments[number] = input_moments(model, blocks, full=True)
        inputs.reporter.say(f"hidden states of '{name}': {moments[number].tokens:,} tokens of {', '.join(domains)}")
    means = [domain.mean for domain in moments.values()]
    mean = torch.stack(means).mean(dim=0)
    second = torch.stack([domain.second for domain in moments.values()]).mean(dim=0)
    within = second - torch.stack([m[:, :, None] * m[:, None, :] for m in means]).mean(dim=0)
    scale = within.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    within += options["ridge"] * scale * torch.eye(inputs.width, dtype=within.dtype)
    rows = torch.zeros(inputs.num_layers, len(inputs.experts), inputs.width, dtype=torch.float64)
    biases = torch.zeros(rows.shape[:2], dtype=torch.float64)
    for number, domain in moments.items():
        rows[:, number] = torch.linalg.solve(within, domain.mean - mean)
        biases[:, number] = -(rows[:, number] * (domain.mean + mean)).sum(dim=-1) / 2
    power = second + 1e-6 * scale * torch.eye(inputs.width, dtype=second.dtype)
    unit = torch.linalg.solve(power, mean)
    # its product with hidden states is a least-squares fit of 1, exact on average
    unit /= (unit * mean).sum(dim=-1, keepdim=True)
    return RouterRows(
        rows.numpy().astype(np.float32), biases.numpy().astype(np.float32), unit.numpy().astype(np.float32)[:, None]
    )
