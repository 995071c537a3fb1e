"""A grid of latents as a pyramid of scales, from coarse to fine (VAR: Tian et al., 2024,
arXiv:2404.02905; on continuous latents FlowAR: Ren et al., 2024, arXiv:2412.15205).

A scale is a square of means over areas of the grid; the last is the grid itself. Scales lie one
after another in one sequence, each in raster order, as those of the order `scales` do.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate


def pyramid(latents: Float[Tensor, "b h w c"], sides: Sequence[int]) -> Float[Tensor, "b n c"]:
    """Return the scales of `sides` positions a side."""
    return torch.cat([resized(latents, (s, s), "area").flatten(1, 2) for s in sides], dim=1)


def upscaled(
    scale: Float[Tensor, "b n c"], side: int, full_side: int
) -> Float[Tensor, "b {side*side} c"]:
    """Return what a scale, a square of n positions, tells of one of `side` positions a side: it is
    blown up to the whole grid, smoothly, and averaged."""
    grid = scale.unflatten(1, (isqrt(scale.shape[1]), -1))
    full = resized(grid, (full_side, full_side), "bicubic")
    return resized(full, (side, side), "area").flatten(1, 2)


def pyramid_coordinates(sides: Sequence[int]) -> Float[Tensor, "n 2"]:
    """Return row and column of each position in units of the last scale, whose whole extent each
    scale spans: those of a scale are multiples of last side / side, from 0."""
    axes = (torch.arange(side) * (sides[-1] / side) for side in sides)
    return torch.cat([torch.cartesian_prod(axis, axis) for axis in axes])


def resized(
    grid: Float[Tensor, "b _ _ c"], size: tuple[int, int], mode: Literal["area", "bicubic"]
) -> Float[Tensor, "b _ _ c"]:
    """Return a grid of another size: means over areas, which overlap where sizes do not divide, or
    smoothly between its positions, whose corners are not those of the new ones."""
    if tuple(grid.shape[1:3]) == tuple(size):
        return grid
    return interpolate(grid.movedim(-1, 1), size, mode=mode).movedim(1, -1)
