"""A flow head for single tokens, as NextStep-1's (NextStep Team, 2025, arXiv:2508.10711): the
network of MAR's head (Li et al., 2024, arXiv:2406.11838) learns the velocity of a rectified flow
(Liu et al., 2022, arXiv:2209.03003), and drawing a token is following it from noise to data."""

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.decoding.flow import flow_times, integrate
from vistok.decoding.noise import Noise
from vistok.decoding.sampling import Sampling
from vistok.decoding.schedules import Schedule
from vistok.heads.base import PLAIN, ValueHead
from vistok.layers.denoiser import Denoiser, guided
from vistok.losses.flow import FlowTimes
from vistok.models import register_to_config
from vistok.tokens import TokenSpec

TIME_UNITS = 1000  # from data to noise, as the network is told the time


class FlowHead(ValueHead):
    """Args:
    width, depth: of the network.
    batch_mul: noisy copies of each token that a training step learns from.
    times: density of the times of training; see `FlowTimes`.

    Guidance acts on the velocity; a temperature multiplies the noise from which the flow starts.
    Arithmetic is float32 under autocast.
    """

    samplers = ("euler",)
    steps = Schedule(25)

    @register_to_config
    def __init__(
        self, width: int = 1024, depth: int = 3, batch_mul: int = 4, times: str = "logit_normal"
    ):
        super().__init__()
        self.width, self.depth, self.batch_mul = width, depth, batch_mul
        self.times = FlowTimes(times)

    def build(self, hidden_dim: int, spec: TokenSpec) -> None:
        (self.channels,) = spec.value_shape
        self.net = Denoiser(self.channels, hidden_dim, self.width, self.depth, self.channels)

    def loss(
        self, hidden: Float[Tensor, "b s d"], target: Float[Tensor, "b s c"]
    ) -> Float[Tensor, "b s"]:
        copies = (self.batch_mul, *target.shape)
        times = self.times.draw(self.batch_mul * target[..., 0].numel(), target.device)
        noise = torch.randn(copies, device=target.device)
        return self.loss_at(hidden, target, times.view(copies[:-1]), noise).mean(0)

    def loss_at(
        self,
        hidden: Float[Tensor, "*rows d"],
        target: Float[Tensor, "*rows c"],
        times: Float[Tensor, "*copies"],
        noise: Float[Tensor, "*copies c"],
    ) -> Float[Tensor, "*copies"]:
        """Return the mean squared error of the velocity, noise less data, at `times` in [0, 1], of
        which 1 is noise. There may be more axes of copies before those of the rows."""
        with torch.autocast(target.device.type, enabled=False):
            target = target.float()
            noisy = torch.lerp(target, noise, times[..., None])
            velocity = self.net(noisy, TIME_UNITS * times, hidden.float())
            return (velocity - (noise - target)).square().mean(-1)

    def draw_noise(
        self, noise: Noise, num_tokens: int, sampling: Sampling = PLAIN, budget: int = 1
    ) -> Float[Tensor, "b n 1 c"]:
        return noise.normal(num_tokens, 1, self.channels)

    def evaluations(self, sampling: Sampling, budget: int) -> int:
        return len(flow_times(sampling.sampler or self.samplers[0], budget)) - 1

    def sample(
        self,
        hidden: Float[Tensor, "b s d"],
        null: Float[Tensor, "b s d"] | None,
        scale: float,
        noise: Float[Tensor, "b s 1 c"],
        sampling: Sampling,
        budget: int,
    ) -> Float[Tensor, "b s c"]:
        sampler = sampling.sampler or self.samplers[0]
        times = flow_times(sampler, budget)[:-1].float().to(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            networks = self.net.at(TIME_UNITS * times, hidden, null)

            def velocity(x: Tensor, step: int) -> Tensor:
                return guided(next(networks)(x), scale)

            return integrate(velocity, sampling.temperature * noise, sampler, budget)
