"""Where stitches stand: at equal depths of the hub, and at the same share of the depth of every expert."""

from __future__ import annotations

from ...core.errors import UserError


def hub_points(num_layers: int, num_stitches: int) -> tuple[int, ...]:
    """Return after how many of its layers the hub is stitched, the last time after all (arXiv:2502.00075, section 3).

    Raises `UserError` for more stitches than layers.
    """
    if not 1 <= num_stitches <= num_layers:
        raise UserError(
            f"num_stitches is {num_stitches}, and the hub has {num_layers} layers; take 1 to {num_layers}"
        )
    every = num_layers // num_stitches
    return (*(every * number for number in range(1, num_stitches)), num_layers)


def matched_points(points: tuple[int, ...], name: str, num_layers: int) -> tuple[int, ...]:
    """Return after how many of its layers an expert is stitched: at the hub's shares of the whole depth, rounded.

    `points` are the hub's, the last of which is its depth. Raises `UserError` for an expert that is too shallow.
    """
    depth = points[-1]
    found = tuple(round(point * num_layers / depth) for point in points)
    if any(second <= first for first, second in zip((0, *found), found, strict=False)):
        raise UserError(
            f"expert '{name}' has {num_layers} layers, too few for {len(points)} stitches at the depths of the hub's "
            f"({', '.join(map(str, points))} of {depth}); take fewer with --option num_stitches"
        )
    return found


def joins_hub(number: int, num_stitches: int) -> bool:
    """Tell whether a stitch leads from the experts into the hub: the last does, and before it every second one."""
    return (num_stitches - 1 - number) % 2 == 0
