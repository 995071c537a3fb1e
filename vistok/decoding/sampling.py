"""Sampling of categorical tokens: temperature, top-k, top-p, and one uniform number per token."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.decoding.samplers import Sampler
from vistok.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 takes the most likely one; `top_k` 0 and `top_p` 1 leave
    a distribution whole; `sampler` is that of an iterative head, None for its own."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    sampler: Sampler | None = None

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"{self}: needs temperature >= 0, top_k >= 0 (0 keeps all) and 0 < top_p <= 1"
            )


def probabilities(
    logits: Float[Tensor, "*batch v"], sampling: Sampling
) -> Float[Tensor, "*batch v"]:
    """Return the sharpened distribution, float32; temperature must be positive.

    Top-k keeps ties of the k-th logit; top-p (nucleus, Holtzman et al., 2020) keeps the most likely
    tokens up to and including the one that crosses p.
    """
    logits = logits.float()
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    limited = 0 < sampling.top_k < logits.shape[-1]
    if limited:
        ranked, order = logits.topk(sampling.top_k, dim=-1)
        logits = logits.masked_fill(logits < ranked[..., -1:], -torch.inf)
    probs = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        # The most likely ones are in order already, but for ties of the last, which all stay.
        if limited:
            ranked = probs.gather(-1, order)
        else:
            ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        beyond = ranked.cumsum(dim=-1) - ranked >= sampling.top_p
        dropped = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, order, beyond)
        probs = probs.masked_fill(dropped, 0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def sample_categorical(
    logits: Float[Tensor, "*batch v"],
    uniform: Float[Tensor, "*batch"] | Float[Tensor, "*batch v"],
    sampling: Sampling,
) -> Int64[Tensor, "*batch"]:
    """Draw one token per row by inverting the cumulative distribution at `uniform` in [0, 1); with
    a number for each entry of the vocabulary, by the Gumbel-max rule, which couples draws of
    different distributions and is what stored runs of other samplers come to.

    Fixed shapes and no host synchronisation, unlike `torch.multinomial`; a token depends on its own
    row and numbers alone.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probs = probabilities(logits, sampling)
    if uniform.ndim == logits.ndim:
        return (probs.double().log() + gumbel(uniform)).argmax(dim=-1)
    return inverse_cdf(probs, uniform)


def gumbel(uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return standard Gumbel noise, float64 and finite, from uniforms in [0, 1]."""
    tiny = 1e-20
    return -(-uniform.double().clamp(min=tiny).log()).clamp(min=tiny).log()


def inverse_cdf(
    probs: Float[Tensor, "*batch v"], uniform: Float[Tensor, "*batch"]
) -> Int64[Tensor, "*batch"]:
    """Return the entry of each distribution at which its sum, in float64, passes `uniform`."""
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    # The sum is one but for rounding; below it, the first larger entry has a positive probability.
    total = cumulative[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniform.double().unsqueeze(-1) * total, below)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
