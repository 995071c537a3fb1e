"""Smoother pictures of VAR (Tian et al., 2024, arXiv:2404.02905): in place of a drawn code, the
mean of all codes under their distribution with Gumbel noise (Jang et al., 2016, arXiv:1611.01144),
the sharper the finer the scale. Published scores are without it."""

from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.decoding.loop import Draw
from vistok.decoding.noise import Noise
from vistok.decoding.orders import Order
from vistok.decoding.plans import Pass, Plan
from vistok.decoding.sampling import Sampling, gumbel, probabilities
from vistok.generators.var import VAR, DecodingState
from vistok.heads.base import PLAIN, Head
from vistok.tokens import TokenSpec


class Smooth:
    """A VAR that `decode` asks for mean codes in place of ids.

        latents = decode(Smooth(model), labels, noise, decoding)
        images = tokenizer.to_images(latents).clamp(0, 1)

    What is decoded are codes (B, N, c), as those are that may be `Given`; what they come to is the
    sum of the scales, (B, h, w, c).
    """

    def __init__(self, model: VAR):
        self.model, self.spec, self.codes = model, model.spec, model.codes
        self.decoded = TokenSpec.latents(model.spec.shape, model.codes.dim, ordered=True)
        self.head = MeanCode(model)

    def plan(self, order: Order | None = None) -> Plan:
        return self.model.plan(order)

    def with_null(self, condition: Int64[Tensor, "b"]) -> Int64[Tensor, "2*b"]:
        return self.model.with_null(condition)

    def new_state(self, rows: int, plan: Plan) -> DecodingState:
        return self.model.new_state(rows, plan)

    def step(self, tokens: Tensor, condition: Tensor, fed: Pass, state: DecodingState) -> Tensor:
        return self.model.step(tokens, condition, fed, state)

    def draw(
        self,
        tokens: Float[Tensor, "b n c"],
        condition: Int64[Tensor, "b"],
        fed: Pass,
        state: DecodingState,
        how: Draw,
    ) -> Float[Tensor, "_ s c"]:
        hidden = self.step(tokens, condition, fed, state)
        null = hidden[how.batch :] if len(hidden) > how.batch and how.scale != 1 else None
        logits = self.model.head.guided_logits(hidden[: how.batch], null, how.scale)
        progress = state.scale / max(1, len(self.codes.scales) - 1)
        return self.head.mean(logits, how.noise, how.sampling, progress)

    def finish(self, decoded: Float[Tensor, "b n c"]) -> Float[Tensor, "b h w c"]:
        grids = (decoded[:, begin:end] for begin, end in pairwise(self.model.ends))
        shaped = (g.unflatten(1, s) for g, s in zip(grids, self.codes.scales, strict=True))
        return sum(self.codes.added(grid, scale) for scale, grid in enumerate(shaped))


class MeanCode(Head):
    """The mean of the codes of a model, with a number of noise for each code and position."""

    def __init__(self, model: VAR):
        super().__init__()
        self.vocab_size, self.quantizer = model.spec.vocab_size, model.codes.quantizer

    def draw_noise(
        self, noise: Noise, num_tokens: int, sampling: Sampling = PLAIN, budget: int = 1
    ) -> Float[Tensor, "b n v"]:
        return noise.uniform(num_tokens, self.vocab_size)

    def mean(
        self,
        logits: Float[Tensor, "b s v"],
        noise: Float[Tensor, "b s v"],
        sampling: Sampling,
        progress: float,
    ) -> Float[Tensor, "b s c"]:
        """`progress` is the number of the scale over that of the last."""
        temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
        kept = probabilities(logits, sampling).double().log()
        weights = ((kept * (1 + progress) + gumbel(noise)) / temperature).softmax(-1)
        codes = self.quantizer.decode(torch.arange(self.vocab_size, device=logits.device))
        return weights.to(codes) @ codes
