"""The categorical head: one softmax over the codebook."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vistok.decoding.noise import Noise
from vistok.decoding.sampling import Sampling, sample_categorical
from vistok.heads.base import PLAIN, Head
from vistok.layers.linear import Linear
from vistok.models import register_to_config


class CategoricalHead(Head):
    """A linear map to logits, float32, by default without bias; zero at the start: training begins
    at the uniform distribution."""

    @register_to_config
    def __init__(self, dim: int, vocab_size: int, bias: bool = False):
        super().__init__()
        self.linear = Linear(dim, vocab_size, bias)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def logits(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch v"]:
        return self.linear(hidden).float()

    def loss(
        self, hidden: Float[Tensor, "b s d"], target: Int64[Tensor, "b s"]
    ) -> Float[Tensor, "b s"]:
        return cross_entropy(self.logits(hidden).transpose(1, 2), target, reduction="none")

    def draw_noise(
        self, noise: Noise, num_tokens: int, sampling: Sampling = PLAIN, budget: int = 1
    ) -> Float[Tensor, "b n *v"]:
        return noise.uniform(num_tokens)

    def sample(
        self,
        hidden: Float[Tensor, "b s d"],
        null: Float[Tensor, "b s d"] | None,
        scale: float,
        noise: Float[Tensor, "b s *v"],
        sampling: Sampling,
        budget: int = 1,
    ) -> Int64[Tensor, "b s"]:
        return sample_categorical(self.guided_logits(hidden, null, scale), noise, sampling)

    def guided_logits(
        self, hidden: Float[Tensor, "b s d"], null: Float[Tensor, "b s d"] | None, scale: float
    ) -> Float[Tensor, "b s v"]:
        if null is not None:
            # The head is affine: guiding the hidden states guides the logits at half the cost.
            hidden = torch.lerp(null, hidden, scale)
        return self.logits(hidden)
