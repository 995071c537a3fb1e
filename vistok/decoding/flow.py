"""Sampling of rectified flows (Liu et al., 2022, arXiv:2209.03003), from noise at time 1 to data at
time 0, by a velocity, of noise less data, that a network finds.

Tokens flow by the samplers of xAR (Ren et al., 2025, arXiv:2502.20388) and FlowAR (Ren et al.,
2024, arXiv:2412.15205), in `integrate`. Images flow by a `FlowSampler` in even steps under guidance
that is plain (Ho and Salimans, 2022, arXiv:2207.12598) or projected (APG: Sadat et al., 2024,
arXiv:2410.02416): of the guidance only what stands across the prediction is kept in full, its norm
is limited, and past guidance counts against it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vistok.decoding.samplers import Sampler
from vistok.decoding.schedules import Schedule
from vistok.errors import UserError

# The least number of steps of each sampler of tokens.
LEAST_STEPS = {"euler": 1, "euler_maruyama": 2, "flowar": 2}
LAST_TIME = 0.04  # of the stochastic equation: from there one step leads to the data


def flow_times(sampler: Sampler | str, steps: int) -> Float64[Tensor, "t"]:
    """Return the times at which the steps of `euler`, `euler_maruyama` or `flowar` begin, and the
    end, 0. Raises `UserError` for fewer steps than the sampler can do with.

    FlowAR's are even for 50 steps alone; otherwise the same number lies above 0.3 and below 0.25.
    """
    name = Sampler(sampler).name
    if steps < LEAST_STEPS[name]:
        raise UserError(f"sampler {name}: takes {LEAST_STEPS[name]} steps or more, not {steps}")
    if name == "euler_maruyama":
        return torch.nn.functional.pad(_even(1.0, LAST_TIME, steps), (0, 1))
    if name == "flowar" and steps != 50:
        return torch.cat([_even(1.0, 0.3, steps // 2), _even(0.25, 0.0, steps // 2 + 1)])
    return _even(1.0, 0.0, steps + 1)


def time_id(times: Float[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Return the whole numbers, in thousandths, by which networks know times in [0, 1]. The product
    is one of float32, as in the published models; others round to other numbers."""
    return (times.float() * 1000).long()


def num_draws(sampler: Sampler | str, steps: int) -> int:
    """Return how often noise is drawn: at the start, and by a stochastic sampler after every step
    but the last."""
    return steps if Sampler(sampler).name == "euler_maruyama" else 1


def integrate(
    velocity: Callable[[Tensor, int], Tensor],
    noise: Float[Tensor, "b s k c"],
    sampler: Sampler | str,
    steps: int,
) -> Float[Tensor, "b s c"]:
    """Return the tokens to which `noise` flows, of which the first draw is the start and the others
    go to the steps. `velocity` takes the float32 state and the number of a step, which begins at
    the time of this number in `flow_times`.

    The stochastic equation diffuses by twice the time: with the score of a straight path its drift
    is (2 - t) v + x.
    """
    stochastic = Sampler(sampler).name == "euler_maruyama"
    times = flow_times(sampler, steps).tolist()
    x, *draws = noise.float().unbind(2)
    for step, (time, after) in enumerate(pairwise(times)):
        drift = velocity(x, step).float()
        if stochastic:
            drift = torch.add(x, drift, alpha=2 - time)
        x = torch.add(x, drift, alpha=after - time)
        if stochastic and after > 0:
            x = torch.add(x, draws[step], alpha=math.sqrt(2 * time * (time - after)))
    return x


def _even(begin: float, end: float, points: int) -> Float64[Tensor, "t"]:
    return torch.linspace(begin, end, points, dtype=torch.float64)


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
