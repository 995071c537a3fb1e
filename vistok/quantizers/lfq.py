"""Lookup-free quantization (MAGVIT-2: Yu et al., 2023, arXiv:2310.05737, section 3.1): a code is
the signs of the channels, so that no codebook is kept or searched."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vistok.errors import UserError
from vistok.layers.processes import mean_of_processes
from vistok.losses.entropy import entropy_of_mean
from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, Quantizer, code_statistics
from vistok.quantizers.estimators import straight_through
from vistok.tokens import TokenSpec

MOST_CODES = 2**24  # whose mean probabilities are kept


class LFQ(Quantizer):
    """Codes of ±scale per channel; the id has a bit of each, set where the latent is above 0, the
    first channel's the least significant (see `reverse_bits` for the other order).

    The entropy loss is E[H(p)] - gamma H(E[p]) (eq. 4 there): confident latents, evenly used codes.
    p, the softmax of -|z - c|^2 / temperature over all codes c, is a product of one Bernoulli
    distribution per channel: H(p) is a sum over channels, and the mean of p over latents one matrix
    product of the probabilities of either half of the channels.

    Args:
        dim: channels of a latent, bits of a code.
        entropy: weight of the entropy loss.
        gamma: weight of evenly used codes within it.
        commitment: weight of the loss that pulls latents to their codes.
        temperature: of p; the inverse of what other libraries call inverse temperature.
        clamped: logarithms of mean probabilities take those below 1e-5 as 1e-5, as other libraries
            do, instead of adding 1e-5 to all: rarer codes have no gradient then.
        scale: size of a code's numbers.
        bitwise: evenly used bits instead of codes (see `BSQ`): an upper bound of the entropy of
            codes, for more channels than 24.
        factors: numbers of channels, which add up to `dim`: the tokens are then the ids of so many
            consecutive groups of channels, instead of one large id (Open-MAGVIT2: Luo et al., 2024,
            arXiv:2409.04410).
    """

    @register_to_config
    def __init__(
        self,
        dim: int,
        entropy: float = 0.1,
        gamma: float = 1.0,
        commitment: float = 0.25,
        temperature: float = 0.01,
        clamped: bool = False,
        scale: float = 1.0,
        bitwise: bool = False,
        factors: Sequence[int] | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if not 1 <= dim <= 62:
            raise UserError(f"{name}: dim {dim} must be from 1 to 62, the bits of an id")
        if temperature <= 0 or scale <= 0:
            raise UserError(f"{name}: temperature {temperature} and scale {scale} must be positive")
        if entropy and not bitwise and 2**dim > MOST_CODES:
            raise UserError(
                f"{name}: the entropy of 2^{dim} codes takes a table of them: set bitwise, or make "
                "a Product of quantizers of at most 24 channels"
            )
        if factors is not None and (sum(factors) != dim or min(factors) < 1):
            raise UserError(f"{name}: factors {list(factors)} must be positive and add up to {dim}")
        self.dim = dim
        self.vocab_size = 2**dim
        self.entropy = entropy
        self.gamma = gamma
        self.commitment = commitment
        self.temperature = temperature
        self.clamped = clamped
        self.scale = scale
        self.bitwise = bitwise
        self.factors = None if factors is None else tuple(factors)
        self.levels = tuple(2**n for n in self.factors or (dim,))

    def spec(self, shape: Sequence[int], ordered: bool = False) -> TokenSpec:
        if self.factors is None:
            return super().spec(shape, ordered)
        return TokenSpec.factorised(tuple(shape), self.levels, ordered)

    def forward(self, latents: Float[Tensor, "*positions d"]) -> Quantized:
        prepared = self._prepared(latents)
        positive = prepared > 0
        codes = self._codes(positive)
        losses = {"commitment": self.commitment * F.mse_loss(prepared, codes)}
        if self.entropy:
            of_each, of_mean = self.entropies(latents)
            losses["entropy"] = self.entropy * (of_each - self.gamma * of_mean)
        quantised = straight_through(prepared, codes) if self.training else codes
        ids = self._ids(positive)
        return Quantized(quantised, ids, losses, *code_statistics(ids, self.levels))

    def encode(self, latents: Float[Tensor, "*positions d"]) -> Int64[Tensor, "*tokens"]:
        return self._ids(self._prepared(latents) > 0)

    def decode(self, ids: Int64[Tensor, "*tokens"]) -> Float[Tensor, "*positions d"]:
        if self.factors is None:
            return self._codes(_bits(ids, self.dim))
        groups = zip(ids.unbind(-1), self.factors, strict=True)
        return self._codes(torch.cat([_bits(number, count) for number, count in groups], dim=-1))

    def entropies(
        self, latents: Float[Tensor, "*positions d"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the mean entropy of p, and that of the mean of p over the latents of all
        processes, in nats."""
        with torch.autocast(latents.device.type, enabled=False):
            # |z + s|^2 - |z - s|^2 = 4 z s in each channel.
            logits = 4 * self.scale / self.temperature * self._prepared(latents)
            logits = logits.reshape(-1, self.dim)
            on = torch.sigmoid(logits)
            surprise = on * F.softplus(-logits) + (1 - on) * F.softplus(logits)
            if self.bitwise:
                mean = mean_of_processes(on.mean(0))
                mean = torch.stack([mean, 1 - mean])
            else:
                half = self.dim // 2
                low, high = _joint(logits[:, :half]), _joint(logits[:, half:])
                mean = mean_of_processes(high.T @ low / len(logits))
            return surprise.sum(-1).mean(), entropy_of_mean(mean, self.clamped)

    def _prepared(self, latents: Float[Tensor, "*positions d"]) -> Float[Tensor, "*positions d"]:
        """Return what is compared with the codes."""
        return latents.float()

    def _codes(self, positive: Bool[Tensor, "*positions d"]) -> Float[Tensor, "*positions d"]:
        return self.scale * (2 * positive.float() - 1)

    def _ids(self, positive: Bool[Tensor, "*positions d"]) -> Int64[Tensor, "*tokens"]:
        if self.factors is None:
            return _number(positive)
        return torch.stack([_number(group) for group in positive.split(self.factors, -1)], dim=-1)


class BSQ(LFQ):
    """Binary spherical quantization (Zhao et al., 2024, arXiv:2406.07548): latents and codes are
    unit vectors, and the entropy loss is on bits.

    Args:
        dim: channels of a latent, bits of a code.
        commitment: weight of the loss that pulls latents to their codes; how far they can be from
            them is bounded anyhow.
        bitwise: evenly used bits; codes if not.
        lfq: the other arguments of `LFQ`.
    """

    settled = ("scale",)

    @register_to_config
    def __init__(self, dim: int, commitment: float = 0.0, bitwise: bool = True, **lfq):
        super().__init__(
            dim, commitment=commitment, bitwise=bitwise, scale=max(1, dim) ** -0.5, **lfq
        )

    def _prepared(self, latents: Float[Tensor, "*positions d"]) -> Float[Tensor, "*positions d"]:
        return F.normalize(latents.float(), dim=-1)


def reverse_bits(ids: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Return ids whose first channel is the most significant of `bits` as ids whose first channel
    is the least significant, and these as those."""
    return _number(_bits(ids, bits).flip(-1))


def _number(bits: Bool[Tensor, "*shape n"]) -> Int64[Tensor, "*shape"]:
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def _bits(ids: Int64[Tensor, "*shape"], count: int) -> Bool[Tensor, "*shape {count}"]:
    return (ids.unsqueeze(-1) >> torch.arange(count, device=ids.device) & 1).bool()


def _joint(logits: Float[Tensor, "n bits"]) -> Float[Tensor, "n codes"]:
    """Return the probability of each code of independent bits, given the log-odds of each."""
    found = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(-1):
        both = torch.stack([torch.sigmoid(-bit), torch.sigmoid(bit)], dim=-1)
        found = (both.unsqueeze(-1) * found.unsqueeze(1)).flatten(1)
    return found
