"""The diffusion process of iDDPM (Nichol and Dhariwal, 2021, arXiv:2102.09672) and the chains that
run it backwards: ancestral, DDIM (Song et al., 2020, arXiv:2010.02502) and DPM-Solver of first
order (Lu et al., 2022, arXiv:2206.00927).

Every step is affine in the sample and the predicted noise, so that a chain is a few numbers for
each, made in float64. diffusers' schedulers make the same chains, but keep float32 tables, which
are off by 1e-5, read times off the device in every step, and have no temperature.
"""

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.decoding.samplers import Sampler
from vistok.errors import UserError

NUM_TIMES = 1000  # of the process in training
LARGEST_BETA = 0.999
SOLVER_TIMES = 951  # those of the process, from 0 on, that DPM-Solver interpolates between
SOLVER_START = 0.95  # of a unit of time


def cosine_alphas_cumprod() -> Float[Tensor, "1000"]:
    """Return the share of signal in the variance at each time, by the cosine schedule, float64."""
    at = torch.arange(NUM_TIMES + 1, dtype=torch.float64) / NUM_TIMES
    signal = ((at + 0.008) / 1.008 * math.pi / 2).cos().square()
    betas = (1 - signal[1:] / signal[:-1]).clamp(max=LARGEST_BETA)
    return (1 - betas).cumprod(0)


@dataclass(frozen=True, eq=False)
class Process:
    """The process seen at `times`, ascending, of the training's alone; all numbers are float64.

    Attributes: `alphas_cumprod` and, of the steps between neighbours, `betas`; `sample_weight` and
    `data_weight` of the posterior's mean; `log_variance` of the posterior, whose first, of zero,
    is replaced by the second.
    """

    times: tuple[int, ...]

    @cached_property
    @torch.inference_mode(False)
    def alphas_cumprod(self) -> Float[Tensor, "t"]:
        return cosine_alphas_cumprod()[list(self.times)]

    @cached_property
    @torch.inference_mode(False)
    def previous(self) -> Float[Tensor, "t"]:
        """`alphas_cumprod` one step nearer to the data."""
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    @property
    def betas(self) -> Float[Tensor, "t"]:
        return 1 - self.alphas_cumprod / self.previous

    @property
    def data_weight(self) -> Float[Tensor, "t"]:
        return self.betas * self.previous.sqrt() / (1 - self.alphas_cumprod)

    @property
    def sample_weight(self) -> Float[Tensor, "t"]:
        return (1 - self.previous) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    @property
    def log_variance(self) -> Float[Tensor, "t"]:
        variance = self.betas * (1 - self.previous) / (1 - self.alphas_cumprod)
        return torch.cat([variance[1:2], variance[1:]]).log()

    @property
    def noise_to_signal(self) -> Float[Tensor, "t"]:
        return (1 / self.alphas_cumprod - 1).sqrt()


@lru_cache
def full_process() -> Process:
    """The process of training."""
    return Process(tuple(range(NUM_TIMES)))


@dataclass(frozen=True)
class Step:
    """x <- keep x - remove eps + exp(level + spread v) noise, for predicted noise eps and variance
    v between -1 (the posterior's) and 1; the last step and those of deterministic chains are
    without noise. `time` is what the network is told."""

    time: float
    keep: float
    remove: float
    level: float = -math.inf
    spread: float = 0.0

    def __call__(
        self,
        x: Float[Tensor, "*rows c"],
        eps: Float[Tensor, "*rows c"],
        v: Float[Tensor, "*rows c"],
        noise: Float[Tensor, "*rows c"] | None = None,
    ) -> Float[Tensor, "*rows c"]:
        x = torch.add(self.keep * x, eps, alpha=-self.remove)
        if noise is None:
            return x
        return x.addcmul((self.spread * v + self.level).exp(), noise)


@dataclass(frozen=True, eq=False)
class Chain:
    """The steps from noise to data, of which the first `draws` add noise."""

    steps: tuple[Step, ...]
    draws: int = 0

    def __len__(self) -> int:
        return len(self.steps)

    @lru_cache(maxsize=1024)  # noqa: B019 - chains are cached themselves
    @torch.inference_mode(False)
    def times(self, device: torch.device) -> Float[Tensor, "t"]:
        return torch.tensor([step.time for step in self.steps], device=device)


@lru_cache(maxsize=1024)
def chain(sampler: Sampler, steps: int) -> Chain:
    """Return the chain by which `sampler` draws in `steps` steps, or in fewer where its spelling
    says so; raise `UserError` where there is none."""
    if sampler.name in ("dpm", "dpm_pp"):
        if steps < 1:
            raise unfit(sampler, steps, "takes 1 or more")
        return solver_chain(steps)
    process = Process(tuple(kept_times(sampler, steps)))
    if sampler.name == "ddim":
        return ddim_chain(process)
    if len(process.times) < 2:
        raise unfit(sampler, steps, "an ancestral chain takes 2 steps or more")
    return ancestral_chain(process)


def unfit(sampler: Sampler, steps: int, reason: str) -> UserError:
    return UserError(f"sampler '{sampler}' in {steps} step(s): {reason}")


def ancestral_chain(process: Process) -> Chain:
    """Draws from the posterior, whose log-variance the network interpolates up to that of the
    forward step."""
    # The mean weighs the sample and the data, which themselves are of the sample and the noise.
    data = process.data_weight
    keep = process.sample_weight + data / process.alphas_cumprod.sqrt()
    remove = data * process.noise_to_signal
    # Half the log-variance, v running from -1 to 1.
    level = (process.betas.log() + process.log_variance) / 4
    spread = (process.betas.log() - process.log_variance) / 4
    steps = backwards(process.times, keep, remove, level, spread)
    return Chain(steps, draws=len(steps) - 1)


def ddim_chain(process: Process) -> Chain:
    """To the predicted data, then back by the predicted noise to the time before."""
    remove = process.previous.sqrt() * process.noise_to_signal - (1 - process.previous).sqrt()
    keep = (process.previous / process.alphas_cumprod).sqrt()
    return Chain(backwards(process.times, keep, remove))


def solver_chain(steps: int) -> Chain:
    """DPM-Solver of first order, in even steps of continuous time. Whether it steers by noise or,
    as DPM-Solver++, by data is the same at this order: both are DDIM at times between those of
    training, where the logarithm of the share of signal is interpolated."""
    end = 1 / SOLVER_TIMES
    times = [SOLVER_START + (end - SOLVER_START) * step / steps for step in range(steps + 1)]
    nodes = [SOLVER_START * (i + 1) / SOLVER_TIMES for i in range(SOLVER_TIMES)]
    logs = (cosine_alphas_cumprod()[:SOLVER_TIMES].log() / 2).tolist()

    def signal(time: float) -> float:
        right = min(max(bisect(nodes, time), 1), SOLVER_TIMES - 1)
        share = (time - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
        return math.exp(logs[right - 1] + share * (logs[right] - logs[right - 1]))

    def step(time: float, after: float) -> Step:
        ratio = signal(after) / signal(time)
        noise, noise_after = (math.sqrt(1 - signal(t) ** 2) for t in (time, after))
        return Step(1000 * time, ratio, ratio * noise - noise_after)

    return Chain(tuple(step(*pair) for pair in pairwise(times)))


def backwards(times: Sequence[int], *numbers: Float[Tensor, "t"]) -> tuple[Step, ...]:
    """Return the steps with these numbers for each time, the last time first."""
    rows = zip(times, *(column.tolist() for column in numbers), strict=True)
    return tuple(Step(float(time), *row) for time, *row in reversed(list(rows)))


def kept_times(sampler: Sampler, steps: int) -> list[int]:
    """Return the times of training, ascending, at which the chain calls the network."""
    if not all(number.is_integer() for number in sampler.numbers):
        raise unfit(sampler, steps, "takes whole numbers")
    numbers = [int(number) for number in sampler.numbers]
    if sampler.name == "sections":
        return section_times(sampler, numbers)
    latest = numbers[0] if numbers else NUM_TIMES - 1
    if not 0 < latest < NUM_TIMES:
        raise unfit(sampler, steps, f"begins at a time from 1 to {NUM_TIMES - 1}")
    if sampler.name == "ddpm":
        times = section_times(sampler, [steps])
    else:
        times = strided_times(sampler, steps)
    return sorted({min(time, latest) for time in times})


def section_times(sampler: Sampler, counts: Sequence[int]) -> list[int]:
    """Return so many evenly spaced times of each of equal sections, the first of which take what is
    left over. Positions add up before they are rounded, half to even, as in the released code: a
    grid that is rounded at once has other times for some counts."""
    size, over = divmod(NUM_TIMES, len(counts))
    times, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < over)
        if not 0 <= count <= length:
            raise unfit(sampler, sum(counts), f"a section of {length} times takes 0 to {length}")
        position, stride = 0.0, (length - 1) / max(1, count - 1)
        for _ in range(count):
            times.append(start + round(position))
            position += stride
        start += length
    return times


def strided_times(sampler: Sampler, steps: int) -> list[int]:
    """Return the multiples of the smallest stride of which exactly so many lie in the process; if
    `sampler` names a latest time, in the longest part of the process for which there is one."""
    for end in range(NUM_TIMES, 1, -1) if sampler.numbers else [NUM_TIMES]:
        for stride in range(1, end):
            if len(range(0, end, stride)) == steps:
                return list(range(0, end, stride))
    raise unfit(
        sampler,
        steps,
        f"no stride has so many multiples below {NUM_TIMES}; 10, 20, 25, 50 and 100 steps fit, and "
        f"ddim(980) takes any number from 2 to {NUM_TIMES}",
    )
