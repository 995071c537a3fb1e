"""Which tokens of an image stay when a part of it is decoded anew, for `Given`: in- and outpainting
without training (VAR: Tian et al., 2024, arXiv:2404.02905, section 5.3)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import interpolate

FEWEST = 4  # positions of a scale of which a part may stay


def box(
    size: Sequence[int],
    top: float,
    left: float,
    bottom: float,
    right: float,
    outside: bool = False,
) -> Bool[Tensor, "h w"]:
    """Return a grid that is true inside of a box given in fractions of the sides, or `outside`."""
    height, width = size
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[
        round(top * height) : round(bottom * height), round(left * width) : round(right * width)
    ] = True
    return ~mask if outside else mask


def kept_of_scales(
    mask: Bool[Tensor, "h w"], scales: Sequence[tuple[int, int]]
) -> Bool[Tensor, "n"]:
    """Return which tokens of scales stay, given those that are to stay of a grid: where more than
    half of a position lies among these, and all those of the coarsest scales, which say what the
    image is of."""
    kept = []
    for height, width in scales:
        if height * width < FEWEST:
            kept.append(torch.ones(height * width, dtype=torch.bool))
        else:
            share = interpolate(mask[None, None].float(), (height, width), mode="bilinear")
            kept.append(share.flatten() > 0.5)
    return torch.cat(kept)
