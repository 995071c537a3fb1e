"""Squares of a map as vectors, and back."""

from jaxtyping import Float
from torch import Tensor


def to_patches(x: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b n d"]:
    """Return the squares of side `size` row by row, each in the order (row, column, channel)."""
    squares = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # B C GH P GW P
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def from_patches(
    patches: Float[Tensor, "b n d"], grid: tuple[int, int], size: int
) -> Float[Tensor, "b c h w"]:
    """Return the map of which `to_patches` makes these, `grid` squares high and wide."""
    squares = patches.unflatten(2, (size, size, -1)).unflatten(1, grid)  # B GH GW P P C
    return squares.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
