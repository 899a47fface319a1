"""Ways to begin a mixture's router: drawn, equal, from what experts bring, from validation text.

Shapes: L = layers, E = experts, d = width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError
from ....core.hooks.mixtures import RouterInputs, RouterStart

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROUTER_FILE = "router.safetensors"
"""Beside an expert's weights: `rows` (L, d), `biases` (L,), and the mean hidden states `domain` and `public` (L, d)."""
_SAMPLES = 64
_RIDGE = 1e-3


def options_of(inputs: RouterInputs, defaults: Mapping[str, Any], router: str) -> dict[str, Any]:
    """Return a router start's options over its defaults; raises `UserError` for one that it does not have."""
    for key, value in inputs.options.items():
        if key not in defaults:
            raise UserError(
                f"router start '{router}' has no option '{key}'; it has {', '.join(defaults) or 'none'}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"option '{key}' of router start '{router}' is {value!r}, which is no number")
    return {**defaults, **inputs.options}


def random_rows(inputs: RouterInputs) -> RouterStart:
    """Return normal rows of standard deviation 0.02 (Branch-Train-MiX, arXiv:2403.07816, section 2.2).

    An expert's row is drawn by `seed` and its name, so that it is the same whoever else is in the mixture.
    """
    chosen = options_of(inputs, {"seed": 0, "deviation": 0.02}, "random")
    return _drawn(
        inputs, chosen["seed"], lambda source, shape: source.standard_normal(shape) * chosen["deviation"]
    )


def linear_rows(inputs: RouterInputs) -> RouterStart:
    """Return rows as a new `torch.nn.Linear` has them: even between -b and b, with b = 1 / sqrt(d); drawn as above."""
    chosen = options_of(inputs, {"seed": 0}, "linear")
    bound = inputs.width**-0.5
    return _drawn(inputs, chosen["seed"], lambda source, shape: source.uniform(-bound, bound, shape))


def _drawn(
    inputs: RouterInputs, seed: float, draw: Callable[[np.random.Generator, tuple[int, int]], NDArray[Any]]
) -> RouterStart:
    import numpy as np

    rows = np.empty((inputs.num_layers, len(inputs.experts), inputs.width), np.float32)
    for number, name in enumerate(inputs.experts):
        key = hashlib.sha256(f"{int(seed)}:{name}".encode()).digest()
        source = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))
        rows[:, number] = draw(source, (inputs.num_layers, inputs.width))
    return RouterStart(rows)


def uniform_rows(inputs: RouterInputs) -> RouterStart:
    """Return rows of 0: every expert the same for every token; of a top-k the first experts are taken."""
    import numpy as np

    options_of(inputs, {}, "uniform")
    return RouterStart(np.zeros((inputs.num_layers, len(inputs.experts), inputs.width), np.float32))


def embedding_rows(inputs: RouterInputs) -> RouterStart:
    """Return the rows and biases that experts bring along, 0 for the seed's own (FlexOlmo, arXiv:2507.07024, 3.3.2).

    Option `scale` multiplies them: a row learned to tell its owner's text from public text, and with more experts
    the softmax over them is flatter than between two.
    """
    import numpy as np

    scale = float(options_of(inputs, {"scale": 1.0}, "embedding")["scale"])
    found = [
        brought_by(folder, name, scale) if folder is not None else None
        for name, folder in inputs.experts.items()
    ]
    shape = (inputs.num_layers, len(found), inputs.width)
    rows, biases = np.zeros(shape, np.float32), np.zeros(shape[:2], np.float32)
    units = np.zeros(shape, np.float32)
    for number, (name, one) in enumerate(zip(inputs.experts, found, strict=True)):
        if one is None:
            continue
        if one.rows.shape != (shape[0], 1, shape[2]):
            raise UserError(
                f"the router rows of '{name}' are {[shape[0], one.rows.shape[-1]]}; the seed needs {[shape[0], shape[2]]}"
            )
        rows[:, number], biases[:, number] = one.rows[:, 0], one.biases[:, 0]
        if one.unit is not None:
            units[:, number] = one.unit[:, 0]
    known = all(one is None or one.unit is not None for one in found)
    return RouterStart(rows, biases, units if known else None)


def brought_by(folder: Path, name: str, scale: float = 1.0) -> RouterStart:
    """Return what one expert brings, times `scale`, for a router of one: rows (L, 1, d), biases (L, 1)."""
    brought = read_router(folder, name)
    unit = None
    if "public" in brought:
        mean = brought["public"]
        unit = (mean / (mean**2).sum(axis=-1, keepdims=True))[:, None]
    return RouterStart(brought["rows"][:, None] * scale, brought["biases"][:, None] * scale, unit)


def read_router(folder: Path, name: str) -> dict[str, NDArray[Any]]:
    """Return what an expert brings for a router; raises `UserError` for an expert that was trained without one."""
    import numpy as np

    from ....core.artefacts.lineage import manifest_path, read_manifest
    from ....core.artefacts.safetensors_io import Checkpoint
    from ...engine.reading import Reader
    from ...sources.models import StoredTensor

    path = folder / ROUTER_FILE
    if not path.is_file():
        raise UserError(
            f"expert '{name}' ({folder}) brings no router row ({ROUTER_FILE}); train it with --trains flexolmo, or choose "
            "another start of the router: --option router=hidden"
        )
    promised = read_manifest(folder).tensors if manifest_path(folder) is not None else {}
    with Reader() as reader:
        found = {
            key: reader.whole(StoredTensor(entry, promised.get(key), name=key))
            for key, entry in Checkpoint([path]).entries.items()
        }
    for key in ("rows", "biases"):
        if key not in found:
            raise UserError(f"{path} has no tensor '{key}'; train the expert again with --trains flexolmo")
        if not np.isfinite(found[key]).all():
            raise UserError(f"the router {key} of expert '{name}' ({path}) are not finite; train it again")
    return found


def hidden_rows(inputs: RouterInputs) -> RouterStart:
    """Return linear discriminants of the hidden states of each expert's validation text.

    Row e is S^-1 (m_e - m), with m_e the mean hidden state of the expert's domains, m that of all and S the pooled
    covariance within the domains; the biases are those of Gaussians of equal covariance. The seed's own expert gets a
    row of 0. Raises `UserError` for an expert whose domain is not among the texts.
    """
    import numpy as np
    import torch

    from ....core.models.feed_forwards import InputMoments, input_moments, spread_blocks
    from ....core.models.loading import load_model

    chosen = options_of(inputs, {"samples": _SAMPLES, "ridge": _RIDGE}, "hidden")
    texts = {text.domain: text.blocks for text in inputs.validation()}
    model, _ = load_model(inputs.seed, dtype="float32")
    found: dict[int, InputMoments] = {}
    for number, (name, folder) in enumerate(inputs.experts.items()):
        if folder is None:
            continue
        domains = [domain for domain in inputs.domains.get(name, ()) if domain in texts] or (
            [name] if name in texts else []
        )
        if not domains:
            raise UserError(
                f"router start 'hidden' needs validation text of the domain of '{name}'; name domains with --fit-on, or "
                "choose another start"
            )
        blocks = [
            block for domain in domains for block in spread_blocks(texts[domain], int(chosen["samples"]))
        ]
        found[number] = input_moments(model, blocks, full=True)
        inputs.say(f"hidden states of '{name}': {found[number].tokens:,} tokens of {', '.join(domains)}")
    moments = list(found.values())
    mean = torch.stack([one.mean for one in moments]).mean(dim=0)
    second = torch.stack([one.second for one in moments]).mean(dim=0)
    within = second - torch.stack([one.mean[:, :, None] * one.mean[:, None, :] for one in moments]).mean(
        dim=0
    )
    scale = within.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    within += chosen["ridge"] * scale * torch.eye(inputs.width, dtype=within.dtype)
    rows = torch.zeros(inputs.num_layers, len(inputs.experts), inputs.width, dtype=torch.float64)
    biases = torch.zeros(rows.shape[:2], dtype=torch.float64)
    for number, one in found.items():
        away = one.mean - mean
        rows[:, number] = torch.linalg.solve(within, away)
        biases[:, number] = -(rows[:, number] * (one.mean + mean)).sum(dim=-1) / 2
    power = second + 1e-6 * scale * torch.eye(inputs.width, dtype=second.dtype)
    unit = torch.linalg.solve(power, mean)
    unit /= (unit * mean).sum(dim=-1, keepdim=True)  # 1 on average, and as near to it as can be everywhere
    return RouterStart(
        rows.numpy().astype(np.float32),
        biases.numpy().astype(np.float32),
        unit.numpy().astype(np.float32)[:, None],
    )
