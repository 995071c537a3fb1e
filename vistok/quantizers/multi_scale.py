"""Multi-scale residual quantization (VAR: Tian et al., 2024, arXiv:2404.02905, algorithms 1 and 2):
a grid of latents as codes of rising resolution, each scale of what the coarser ones left over."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.errors import IncompatibleTokensError, UserError
from vistok.layers.pyramid import resized
from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, Quantizer, code_statistics
from vistok.tokens import TokenSpec


class MultiScale(Quantizer):
    """Codes of one quantizer at each scale, one after another in one sequence, coarse to fine.

    A scale is the mean of what is left, over areas; its codes, blown up to the whole grid, are
    added to the sum and taken from what is left. The sum of the first scales is the whole image,
    coarsely: tokens are ordered, and any first scales decode. The same weights serve other scales.

    Args:
        quantizer: of every scale: its codes are those of one codebook.
        scales: rising positions of a side, or (height, width), of each scale; the last is the grid.
        smoothers: convolutions that smooth what scales add, each serving those about as far along;
            0 for none.
        smoothing: share of the convolution in what is added, the rest being as it was.
        kernel_size: of these convolutions.
        jointly: train the sum of the scales as one: losses compare the sum of the first scales with
            the latents, whose gradient passes through the whole (VAR), and the quantizer's own
            losses come to these, those of a `VQ` best with weights of 0. Otherwise the quantizer
            trains on each scale by itself (TokenFlow).
        commitment: weight of the joint loss that pulls latents to the sums; 1 is that of the loss
            which pulls the sums to latents.
        scale_dropout: probability with which training leaves out a scale, not the first.
    """

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer,
        scales: Sequence[int | Sequence[int]] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        smoothers: int = 4,
        smoothing: float = 0.5,
        kernel_size: int = 3,
        jointly: bool = True,
        commitment: float = 0.25,
        scale_dropout: float = 0.0,
    ):
        super().__init__()
        self.scales = tuple((s, s) if isinstance(s, int) else tuple(s) for s in scales)
        heights, widths = zip(*self.scales, strict=True)
        if any(list(sides) != sorted(sides) or sides[0] < 1 for sides in (heights, widths)):
            raise UserError(f"MultiScale: scales {list(scales)} must be positive and not decrease")
        self.quantizer = quantizer
        self.dim, self.vocab_size = quantizer.dim, quantizer.vocab_size
        self.codebooks = quantizer.spec((1,)).levels or quantizer.vocab_size
        self.sizes = [height * width for height, width in self.scales]
        self.jointly = jointly
        self.commitment = commitment
        self.scale_dropout = scale_dropout
        self.smoothers = nn.ModuleList(
            Smoother(self.dim, kernel_size, smoothing) for _ in range(smoothers)
        )
        self.smoother_of = nearest_ticks(len(self.scales), smoothers) if smoothers else []

    @property
    def in_dim(self) -> int:
        return self.quantizer.in_dim

    def spec(self, shape: Sequence[int], ordered: bool = True) -> TokenSpec:
        """Return what becomes of a grid, which must be the last scale."""
        if tuple(shape) != self.scales[-1]:
            last, found = ("x".join(map(str, size)) for size in (self.scales[-1], shape))
            raise IncompatibleTokensError(
                f"MultiScale: the last scale is {last}, but latents are {found}: set scales that "
                "end there"
            )
        return replace(self.quantizer.spec(shape, ordered=True), shape=self.scales)

    def forward(
        self, latents: Float[Tensor, "b h w d"], kept: Sequence[int] | None = None
    ) -> Quantized:
        """`kept` are the scales to be used; ids of the others are missing. By default all, of which
        training leaves out one as often as `scale_dropout` says."""
        found, sums = [], []
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            read = latents.detach() if self.jointly else latents
            for result, total in self._walk(read, self._quantised, kept or self._kept()):
                found.append(result)
                sums.append(total)
            losses = {k: sum(f.losses[k] for f in found) / len(found) for k in found[0].losses}
            quantised = sums[-1]
            if self.jointly:
                target, sums = latents.expand(len(sums), *latents.shape), torch.stack(sums)
                joint = {
                    "codebook": F.mse_loss(sums, target.detach()),
                    "commitment": self.commitment * F.mse_loss(target, sums.detach()),
                }
                losses |= {name: losses.get(name, 0) + loss for name, loss in joint.items()}
                if self.training:
                    quantised = latents + (quantised - latents).detach()
        ids = torch.cat([result.ids.flatten(1, 2) for result in found], dim=1)
        return Quantized(quantised, ids, losses, *code_statistics(ids, self.codebooks))

    def encode(self, latents: Float[Tensor, "b h w d"]) -> Int64[Tensor, "b n *digits"]:
        def coded(left: Tensor) -> tuple[Tensor, Tensor]:
            ids = self.quantizer.encode(left)
            return ids, self.quantizer.decode(ids)

        with torch.autocast(latents.device.type, enabled=False):
            ids = [ids.flatten(1, 2) for ids, _ in self._walk(latents.float(), coded)]
        return torch.cat(ids, dim=1)

    def decode(
        self, ids: Int64[Tensor, "b n *digits"], lengths: Int64[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b h w d"]:
        """Return the sum of all scales, or of as many first ones as there are ids of, or as the
        first `lengths` ids of each image are."""
        with torch.autocast(ids.device.type, enabled=False):
            added = [self.added(code, scale) for scale, code in enumerate(self.codes(ids))]
        if lengths is not None:
            ends = zip(added, accumulate(self.sizes), strict=False)
            added = [grid * (lengths >= end)[:, None, None, None] for grid, end in ends]
        return sum(added)

    def codes(self, ids: Int64[Tensor, "b n *digits"]) -> list[Float[Tensor, "b _ _ d"]]:
        """Return the codes of each scale, as its grid; raise `UserError` for a broken scale."""
        ends = list(accumulate(self.sizes))
        if ids.shape[1] not in ends:
            raise UserError(
                f"MultiScale: {ids.shape[1]} ids are not those of the first scales, which end at "
                f"{', '.join(map(str, ends))}"
            )
        scales = range(ends.index(ids.shape[1]) + 1)
        of_scale = ids.split([self.sizes[scale] for scale in scales], dim=1)
        grids = (of_scale[scale].unflatten(1, self.scales[scale]) for scale in scales)
        return [self.quantizer.decode(grid) for grid in grids]

    def added(self, codes: Float[Tensor, "b _ _ d"], scale: int) -> Float[Tensor, "b h w d"]:
        """Return what the codes of a scale add to the sum."""
        grid = resized(codes, self.scales[-1], "bicubic")
        return self.smoothers[self.smoother_of[scale]](grid) if self.smoother_of else grid

    def shrunk(self, grid: Float[Tensor, "b h w d"], scale: int) -> Float[Tensor, "b _ _ d"]:
        """Return the means of a grid over the areas of a scale."""
        return resized(grid, self.scales[scale], "area")

    @torch.no_grad()
    def update(self, latents: Float[Tensor, "b h w d"]) -> None:
        def coded(left: Tensor) -> tuple[Tensor, Tensor]:
            return left, self.quantizer.decode(self.quantizer.encode(left))

        left = [left.flatten(1, 2) for left, _ in self._walk(latents.float(), coded)]
        # Image by image: the order of rows is then that of one process with the whole batch.
        self.quantizer.update(torch.cat(left, dim=1))

    def _walk(
        self,
        latents: Float[Tensor, "b h w d"],
        quantise: Callable[[Tensor], tuple[Any, Tensor]],
        kept: Sequence[int] | None = None,
    ) -> Iterator[tuple[Any, Float[Tensor, "b h w d"]]]:
        """Yield what `quantise` makes of each scale beside its codes, and the sum of the scales."""
        left, total = latents, torch.zeros(())
        for scale in range(len(self.scales)) if kept is None else kept:
            result, codes = quantise(self.shrunk(left, scale))
            added = self.added(codes, scale)
            left, total = left - added.detach(), total + added
            yield result, total

    def _quantised(self, left: Float[Tensor, "b _ _ d"]) -> tuple[Quantized, Tensor]:
        result = self.quantizer(left)
        # Trained jointly, codes are to learn from the sum, which the straight-through ones do not.
        return result, self.quantizer.decode(result.ids) if self.jointly else result.quantised

    def _kept(self) -> list[int]:
        kept = list(range(len(self.scales)))
        drops = self.training and self.scale_dropout and len(kept) > 1
        if drops and torch.rand(()) < self.scale_dropout:
            del kept[int(torch.randint(1, len(kept), ()))]
        return kept


class Smoother(nn.Conv2d):
    """Part of a grid as it is, and part of it convolved, in float32."""

    def __init__(self, dim: int, kernel_size: int, share: float):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2)
        self.share = share

    def forward(self, grid: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        smooth = self._conv_forward(grid.movedim(-1, 1), self.weight.float(), self.bias.float())
        return grid.lerp(smooth.movedim(1, -1), self.share)


def nearest_ticks(points: int, ticks: int) -> list[int]:
    """Return which of evenly spread ticks is nearest to each of evenly spread points, the first of
    two that are as near, in double precision, which decides some ties of the published models."""
    margin = 1 / (3 if ticks == 4 else 2) / ticks
    places = np.linspace(margin, 1 - margin, ticks).tolist()
    found = []
    for point in range(points):
        distances = [abs(place - point / max(1, points - 1)) for place in places]
        found.append(distances.index(min(distances)))
    return found
