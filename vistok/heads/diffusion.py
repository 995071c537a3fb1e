"""MAR's diffusion head (Li et al., 2024, arXiv:2406.11838): a small network, given the hidden state
of a token, learns its distribution by denoising; drawing the token is running the chain backwards.
Loss and chain are those of iDDPM (Nichol and Dhariwal, 2021, arXiv:2102.09672).
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.decoding.diffusion import Chain, chain, full_process
from vistok.decoding.noise import Noise
from vistok.decoding.samplers import Sampler
from vistok.decoding.sampling import Sampling
from vistok.decoding.schedules import Schedule
from vistok.heads.base import PLAIN, ValueHead
from vistok.layers.denoiser import Denoiser, guided
from vistok.models import register_to_config
from vistok.tokens import TokenSpec

HALF_BIN = 1 / 255  # of values, as of pictures of 8 bits, whose likelihood the first step counts
LEAST_PROBABILITY = 1e-12


class DiffusionHead(ValueHead):
    """Args:
    width, depth: of the network.
    batch_mul: noisy copies of each token that a training step learns from.

    The published sizes (width, depth): MAR-B 1024, 6; MAR-L 1280, 8; MAR-H 1536, 12.

    The network predicts the noise and where between its two bounds the variance lies. Guidance acts
    on the noise, temperature on what the ancestral chain adds. Arithmetic is float32 under
    autocast, for the first steps magnify errors some hundred times.
    """

    samplers = ("ddpm", "sections", "ddim", "dpm", "dpm_pp")
    steps = Schedule(100)

    @register_to_config
    def __init__(self, width: int = 1024, depth: int = 3, batch_mul: int = 4):
        super().__init__()
        self.width, self.depth, self.batch_mul = width, depth, batch_mul

    def build(self, hidden_dim: int, spec: TokenSpec) -> None:
        (self.channels,) = spec.value_shape
        outputs = 2 * self.channels
        self.net = Denoiser(self.channels, hidden_dim, self.width, self.depth, outputs)

    def loss(
        self, hidden: Float[Tensor, "b s d"], target: Float[Tensor, "b s c"]
    ) -> Float[Tensor, "b s"]:
        process = full_process()
        copies = (self.batch_mul, *target.shape)
        times = torch.randint(len(process.times), copies[:-1], device=target.device)
        noise = torch.randn(copies, device=target.device)
        error, bound = self.loss_at(hidden, target, times, noise)
        return (error + bound).mean(0)

    def loss_at(
        self,
        hidden: Float[Tensor, "*rows d"],
        target: Float[Tensor, "*rows c"],
        times: Int64[Tensor, "*copies"],
        noise: Float[Tensor, "*copies c"],
    ) -> tuple[Float[Tensor, "*copies"], Float[Tensor, "*copies"]]:
        """Return the squared error of the noise and, in bits, the variational bound on the
        likelihood, of which only the variance learns; both are means over channels. There may be
        more axes of copies before those of the rows."""
        with torch.autocast(target.device.type, enabled=False):
            numbers = training_table(target.device)[times].unsqueeze(-2).unbind(-1)
            signal, noisiness, deviation, lowest, highest = numbers
            target = target.float()
            noisy = signal * target + noisiness * noise
            eps, v = self.net(noisy, times, hidden.float()).chunk(2, dim=-1)
            error = eps - noise
            log_variance = torch.lerp(lowest, highest, (v + 1) / 2)
            # How far the predicted mean of the step is from the posterior's.
            distance = deviation * error.detach()
            divergence = gaussian_divergence(distance, lowest, log_variance)
            bits = torch.where(
                times[..., None] == 0,
                -binned_log_likelihood(target, distance, log_variance),
                divergence,
            )
            return error.square().mean(-1), bits.mean(-1) / math.log(2)

    def draw_noise(
        self, noise: Noise, num_tokens: int, sampling: Sampling = PLAIN, budget: int = 1
    ) -> Float[Tensor, "b n draws c"]:
        """The noise that a chain starts from, then that of each step that adds some."""
        return noise.normal(num_tokens, 1 + self.chain(sampling, budget).draws, self.channels)

    def evaluations(self, sampling: Sampling, budget: int) -> int:
        return len(self.chain(sampling, budget))

    def chain(self, sampling: Sampling, budget: int) -> Chain:
        return chain(sampling.sampler or Sampler(self.samplers[0]), budget)

    def sample(
        self,
        hidden: Float[Tensor, "b s d"],
        null: Float[Tensor, "b s d"] | None,
        scale: float,
        noise: Float[Tensor, "b s draws c"],
        sampling: Sampling,
        budget: int,
    ) -> Float[Tensor, "b s c"]:
        with torch.autocast(hidden.device.type, enabled=False):
            *_, x = self.path(hidden, null, scale, noise, sampling, budget)
        return x

    def path(
        self,
        hidden: Float[Tensor, "b s d"],
        null: Float[Tensor, "b s d"] | None,
        scale: float,
        noise: Float[Tensor, "b s draws c"],
        sampling: Sampling,
        budget: int,
    ) -> Iterator[Float[Tensor, "b s c"]]:
        """Yield what `sample` has after each step."""
        chain = self.chain(sampling, budget)
        x, *fresh = noise.unbind(2)
        fresh = [sampling.temperature * normal for normal in fresh]
        fresh += [None] * (len(chain) - chain.draws)
        networks = self.net.at(chain.times(x.device), hidden, null)
        for step, network, normal in zip(chain.steps, networks, fresh, strict=True):
            eps, v = network(x).chunk(2, dim=-1)
            x = step(x, guided(eps, scale), v[0], normal)
            yield x


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def training_table(device: torch.device) -> Float[Tensor, "1000 5"]:
    """Return, for each time, the shares of signal and of noise in a noisy token, the deviation of
    a step's mean for an error of one in the noise, and the bounds of its log-variance."""
    process = full_process()
    columns = [
        process.alphas_cumprod.sqrt(),
        (1 - process.alphas_cumprod).sqrt(),
        process.data_weight * process.noise_to_signal,
        process.log_variance,
        process.betas.log(),
    ]
    return torch.stack(columns, dim=1).float().to(device)


def gaussian_divergence(
    distance: Float[Tensor, "*rows c"],
    log_variance: Float[Tensor, "*rows _"],
    predicted: Float[Tensor, "*rows c"],
) -> Float[Tensor, "*rows c"]:
    """Return the Kullback-Leibler divergence, in nats, of Gaussians whose means have this distance
    and whose second has the `predicted` log-variance."""
    ratio = (log_variance - predicted).exp()
    return 0.5 * (predicted - log_variance - 1 + ratio + distance.square() * (-predicted).exp())


def binned_log_likelihood(
    target: Float[Tensor, "*some c"],
    distance: Float[Tensor, "*rows c"],
    log_variance: Float[Tensor, "*rows c"],
) -> Float[Tensor, "*rows c"]:
    """Return the log-likelihood, in nats, of values in bins of [-1, 1], whose first and last are
    open, under Gaussians whose means lie `distance` below."""
    precision = (-log_variance / 2).exp()
    below = normal_cdf((distance + HALF_BIN) * precision)
    beyond = normal_cdf((distance - HALF_BIN) * precision)
    inside = torch.where(target > 0.999, 1 - beyond, below - beyond)
    probability = torch.where(target < -0.999, below, inside)
    return probability.clamp(min=LEAST_PROBABILITY).log()


def normal_cdf(x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows c"]:
    """The distribution function of the normal, by the approximation of the published loss."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
