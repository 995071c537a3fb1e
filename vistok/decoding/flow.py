"""Sampling of rectified flows (Liu et al., 2022, arXiv:2209.03003) by Euler steps, under guidance
that is plain (Ho and Salimans, 2022, arXiv:2207.12598) or projected (APG: Sadat et al., 2024,
arXiv:2410.02416): of the guidance only what stands across the prediction is kept in full, its norm
is limited, and past guidance counts against it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.decoding.schedules import Schedule
from vistok.errors import UserError


@dataclass(frozen=True)
class Guidance:
    """How a conditional and an unconditional prediction become one. The defaults are those of APG;
    `momentum` 0, no `threshold` and `parallel` 1 are plain guidance.

    `momentum` weighs the guidance of the steps before, `threshold` limits the norm of a sample's
    guidance, and `parallel` weighs the part of it that is parallel to the prediction.
    """

    momentum: float = -0.5
    threshold: float | None = 2.5
    parallel: float = 0.0

    def __call__(
        self,
        conditional: Float[Tensor, "b c h w"],
        unconditional: Float[Tensor, "b c h w"],
        scale: float,
        past: Float[Tensor, "b c h w"] | None = None,
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Return the guided prediction and the `past` of the next step."""
        past = conditional - unconditional + (0 if past is None else self.momentum * past)
        difference = past
        if self.threshold is not None:
            norm = _norm(difference).clamp(min=1e-12)
            difference = difference * (self.threshold / norm).clamp(max=1)
        direction = conditional / _norm(conditional).clamp(min=1e-12)
        along = (difference * direction).sum((1, 2, 3), keepdim=True) * direction
        across = difference - along
        return conditional + (scale - 1) * (across + self.parallel * along), past


@dataclass(frozen=True)
class FlowSampler:
    """From noise, at time 1, to data, at time 0, in equal steps; `scale` runs along them, and where
    it is 1 the unconditional prediction is not made."""

    steps: int = 25
    scale: Schedule = Schedule(7.5)
    guidance: Guidance = Guidance()

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"a flow of {self.steps} steps: expected 1 or more")

    @property
    def times(self) -> Float[Tensor, "t"]:
        """The time at which each step begins."""
        return (self.steps - torch.arange(self.steps)) / self.steps

    def __call__(
        self,
        noise: Float[Tensor, "b c h w"],
        conditional: Callable[[Tensor, int], Tensor],
        unconditional: Callable[[Tensor, int], Tensor],
    ) -> Float[Tensor, "b c h w"]:
        """Return the data to which `noise` flows. Both functions take the sample and the number of
        a step, and return the velocity, of noise less data."""
        x, past = noise, None
        for step in range(self.steps):
            velocity = conditional(x, step)
            scale = self.scale(step / self.steps)
            if scale != 1:
                velocity, past = self.guidance(velocity, unconditional(x, step), scale, past)
            x = x - velocity / self.steps
        return x


def _norm(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 1 1"]:
    return x.square().sum((1, 2, 3), keepdim=True).sqrt()
