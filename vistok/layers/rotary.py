"""Rotary position embedding (Su et al., 2021) on sequences, grids and volumes."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotary_table(
    shape: tuple[int, ...], head_dim: int, base: float = 10000.0
) -> Float[Tensor, "n pairs 2"]:
    """Return (cos, sin) of each position of `shape`, raster order, for each pair of channels.

    The pairs are shared out equally among the axes, in order; along one axis, pair i of its share
    turns by index * base^(-i / share).
    """
    axes = len(shape)
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim {head_dim} must be divisible by {2 * axes} for {axes} axes")
    share = head_dim // (2 * axes)
    frequencies = base ** (-torch.arange(share, dtype=torch.float32) / share)
    coordinates = torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, axes)
    angles = (coordinates[:, :, None] * frequencies).flatten(1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(
    x: Float[Tensor, "b h r d"], table: Float[Tensor, "r pairs 2"]
) -> Float[Tensor, "b h r d"]:
    """Turn the interleaved pairs of channels (2j, 2j + 1) of each row, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
