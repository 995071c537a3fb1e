"""Rotary position embedding (Su et al., 2021) on sequences, grids and volumes."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotary_table(
    shape: tuple[int, ...], head_dim: int, base: float = 10000.0
) -> Float[Tensor, "2 n d"]:
    """Return the factors of each channel at each position of `shape`, raster order."""
    axes = (torch.arange(n) for n in shape)
    coordinates = torch.cartesian_prod(*axes).view(-1, len(shape))
    return rotary_factors(coordinates.float(), head_dim, base)


def rotary_factors(
    coordinates: Float[Tensor, "n axes"], head_dim: int, base: float = 10000.0
) -> Float[Tensor, "2 n d"]:
    """Return the factors of each channel at each point: cosines, and sines that are negative for
    the first channel of each pair (2j, 2j + 1).

    The pairs are shared out equally among the axes, in order; along one axis, pair i of its share
    turns by coordinate * base^(-i / share). Pairs left over do not turn.
    """
    share = head_dim // (2 * coordinates.shape[1])
    frequencies = base ** (-torch.arange(share, dtype=torch.float32) / share)
    turning = (coordinates[:, :, None] * frequencies).flatten(1)
    angles = torch.nn.functional.pad(turning, (0, head_dim // 2 - turning.shape[1]))
    sin = angles.sin()
    return torch.stack(
        [angles.cos().repeat_interleave(2, dim=1), torch.stack([-sin, sin], dim=-1).flatten(1)]
    )


def rotate(x: Float[Tensor, "b h r d"], table: Float[Tensor, "2 r d"]) -> Float[Tensor, "b h r d"]:
    """Turn the pairs of channels of each row, in float32."""
    cos, sin = table
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).view(x.shape)
        return torch.addcmul(x.float() * cos, swapped.float(), sin).to(x.dtype)
    # As products of complex numbers, which pass over the memory once, but which compilers leave.
    factors = torch.complex(cos[:, ::2].float(), sin[:, 1::2].float())
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * factors
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
