"""xAR (Ren et al., 2025, arXiv:2502.20388): autoregression over entities of latents, as squares,
combs or scales, each of which flows from noise as a whole.

One transformer finds the velocity of an entity's positions and remembers the entities before: rows
see their own entity and the earlier ones, and are modulated by the class and the entity's time. In
training every entity has a time of its own, so that the context is noisy, too; in sampling the
context is what was generated, at time 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.decoding.flow import flow_times, integrate, num_draws, time_id
from vistok.decoding.loop import Draw
from vistok.decoding.noise import Noise
from vistok.decoding.orders import Order
from vistok.decoding.plans import Pass, Plan
from vistok.decoding.sampling import Sampling
from vistok.decoding.schedules import Schedule
from vistok.generators.base import Generator, GeneratorOutput
from vistok.generators.conditions import ClassCondition
from vistok.heads.base import PLAIN, Head
from vistok.layers.gated_transformer import gated_width
from vistok.layers.gated_trunk import Caches, GatedTrunk
from vistok.layers.linear import MOST_ROWS, Linear, Weights, by_columns, laid_out
from vistok.layers.positions import TimeEmbedding
from vistok.layers.pyramid import pyramid, pyramid_coordinates
from vistok.losses.flow import FlowTimes
from vistok.models import register_to_config
from vistok.tokens import TokenSpec

CLEAN = 0  # the time of finished entities, as a whole number
MOST_AHEAD = 2**26  # numbers of modulations that are made beforehand


class EntityFlow(Head):
    """What decoding asks of a head. There are no layers: the whole network is the velocity."""

    samplers = ("euler_maruyama", "euler")
    steps = Schedule(50)

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def draw_noise(
        self, noise: Noise, num_tokens: int, sampling: Sampling = PLAIN, budget: int = 1
    ) -> Float[Tensor, "b n k c"]:
        draws = num_draws(sampling.sampler or self.samplers[0], budget)
        return noise.normal(num_tokens, draws, self.channels)

    def evaluations(self, sampling: Sampling, budget: int) -> int:
        return len(flow_times(sampling.sampler or self.samplers[0], budget)) - 1


@dataclass
class DecodingState:
    """Keys and values of finished entities, the modulations of each block by whole time and, where
    another layout is the faster one, weights."""

    cache: Caches
    modulations: dict[int, list[Float[Tensor, "b 1 6 d"]]] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)

    def reset(self) -> None:
        self.cache.reset()
        self.modulations.clear()
        self.weights.clear()

    def keep(self, batch: int) -> None:
        self.cache.keep(batch)
        for time, blocks in self.modulations.items():
            self.modulations[time] = [numbers[:batch] for numbers in blocks]


class XAR(Generator):
    """Args:
    spec: tokens to model; latents of a grid.
    class_names: names of the classes, in the order of their labels.
    order: the entities and their order: `cells(k)`, of which `cells(1)` are single positions and
        the whole grid is the image, `subsamples(s)` or `scales(...)`; see `vistok.Order`. Scales
        are means over areas of the latents.
    dim: width of the transformer.
    depth, num_heads: blocks and heads of its first half.
    decoder_depth, decoder_num_heads: of its second half; None for those of the first.
    hidden_dim: width of the feed-forward layers; None for 8/3 dim.
    dropout: of attention weights and of attention and feed-forward outputs, in training.
    condition_dropout: probability with which training replaces a class by the null class.
    flow_times: density of the times of training; see `FlowTimes`.

    The published sizes (dim, depth, num_heads): B 768, 8, 12; L 1024, 16, 16; H 1280, 20, 16.

    The published settings of sampling are spelt so in a `Decoding`:

    | published | here |
    |---|---|
    | cfg w (B 2.7, L 2.3, H 2.2) | guidance linear(1,w) |
    | num_steps n (B 40, L and H 50) | steps n |
    | DiSA from u to l steps | steps linear(u,l), as linear(50,15) |
    """

    kinds = ("latents",)
    learned = ("cells", "subsamples", "scales")
    _no_split_modules: ClassVar = ["GatedBlock"]

    @register_to_config
    def __init__(
        self,
        spec: TokenSpec,
        class_names: list[str],
        order: str = "cells(8)",
        dim: int = 768,
        depth: int = 8,
        num_heads: int = 12,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.1,
        condition_dropout: float = 0.1,
        flow_times: str = "logit_normal",
    ):
        super().__init__()
        self.check_spec(spec)
        decoder_num_heads = decoder_num_heads or num_heads
        self.check_heads(dim, num_heads)
        self.check_heads(dim, decoder_num_heads)
        self.spec, self.class_names, self.order = spec, tuple(class_names), Order(order)
        self.check_order(self.order, spec)
        self.dropout, self.condition_dropout = dropout, condition_dropout
        self.flow_times = FlowTimes(flow_times)
        self.condition = ClassCondition(len(class_names), dim)
        self.time_embedding = TimeEmbedding(dim)
        self.latent_embed = Linear(spec.dim, dim, bias=True)
        self.trunk = GatedTrunk(
            dim,
            (depth, num_heads),
            (decoder_depth or depth, decoder_num_heads),
            hidden_dim or gated_width(dim),
            dropout,
            self.coordinates(),
        )
        self.output = Linear(dim, spec.dim, bias=True)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.condition.weight, std=0.02)
        self.head = EntityFlow(spec.dim)

    def plan(self, order: Order | None = None) -> Plan:
        if order not in (None, self.order):
            raise self.refusal(order)
        return self.order(self.spec.shape)

    @property
    def orders(self) -> list[str]:
        return [str(self.order)]

    @property
    def decoded(self) -> TokenSpec:
        """The tokens or, if these are its entities, all scales, one after another."""
        return replace(self.spec, shape=self.plan().shape)

    def finish(self, decoded: Float[Tensor, "b *positions c"]) -> Float[Tensor, "b h w c"]:
        """Return the tokens, of which the last scale consists."""
        rows = decoded.view(len(decoded), -1, self.spec.dim)
        return rows[:, -self.spec.num_tokens :].unflatten(1, self.spec.shape)

    def coordinates(self) -> Float[Tensor, "n 2"]:
        """Return row and column of each position that is decoded."""
        if self.decoded.is_scales:
            return pyramid_coordinates([side for side, _ in self.decoded.shape])
        return torch.cartesian_prod(*(torch.arange(float(n)) for n in self.spec.shape))

    def positions(self, tokens: Float[Tensor, "b h w c"]) -> Float[Tensor, "b n c"]:
        """Return what is to be decoded for these tokens."""
        self.spec.check(tokens, type(self).__name__)
        if self.decoded.is_scales:
            return pyramid(tokens, [side for side, _ in self.decoded.shape])
        return tokens.flatten(1, 2)

    def forward(
        self, tokens: Float[Tensor, "b h w c"], condition: Int64[Tensor, "b"]
    ) -> GeneratorOutput:
        """The mean squared error of the velocity of all entities at random times."""
        data = self.positions(tokens)
        batch, entities = len(data), len(self.plan())
        times = self.flow_times.draw(batch * entities, data.device).view(batch, entities)
        return self.loss(data, self.some_null(condition), times, torch.randn_like(data))

    def loss(
        self,
        data: Float[Tensor, "b n c"],
        condition: Int64[Tensor, "b"],
        times: Float[Tensor, "b k"],
        noise: Float[Tensor, "b n c"],
    ) -> GeneratorOutput:
        """The same for given `times` of the entities and `noise` of the positions."""
        time = times[:, self.plan().to(data.device).rank_of_position, None]
        velocity = self.velocity(torch.lerp(data, noise, time), condition, times)
        return GeneratorOutput((velocity - (noise - data)).square().mean())

    def velocity(
        self,
        x: Float[Tensor, "b n c"],
        condition: Int64[Tensor, "b"],
        times: Float[Tensor, "b k"],
    ) -> Float[Tensor, "b n c"]:
        """Return noise less data at the points `x` of all entities, which are at these times, each
        given the points of those before."""
        plan = self.plan().to(x.device)
        rows = plan.joint
        conditions = self.conditions(condition, time_id(times))
        if len(set(plan.sizes)) > 1:
            conditions = conditions[:, plan.rank_of_position[rows.tokens]]
        mask = rows.mask
        # FlexAttention knows no dropout.
        if mask is not None and x.is_cuda and not (self.training and self.dropout):
            mask = rows.block_mask
        velocity = self.transformer(x[:, rows.tokens], rows.tokens, conditions, mask=mask)
        return velocity[:, rows.tokens.argsort()]

    def conditions(
        self, condition: Int64[Tensor, "b"], times: Int64[Tensor, "b k"]
    ) -> Float[Tensor, "b k d"]:
        """Return what classes and whole times modulate blocks by."""
        times = self.time_embedding(times.flatten()).view(*times.shape, -1)
        return self.condition(condition) + times

    def transformer(
        self,
        x: Float[Tensor, "b r c"],
        places: Int64[Tensor, "r"],
        by: Float[Tensor, "b _ d"] | list[Float[Tensor, "b 1 6 d"]],
        **attention,
    ) -> Float[Tensor, "b r c"]:
        """Return the velocity of rows at `places`; `by` is what modulates them, as of the trunk."""
        hidden = self.latent_embed(x.to(self.latent_embed.weight.dtype))
        return self.output(self.trunk(hidden, places, by, **attention)).float()

    def new_state(self, rows: int, plan: Plan) -> DecodingState:
        return DecodingState(self.trunk.new_caches(rows, self.decoded.num_tokens))

    def draw(
        self,
        tokens: Float[Tensor, "b n c"],
        condition: Int64[Tensor, "b"],
        fed: Pass,
        state: DecodingState,
        how: Draw,
    ) -> Float[Tensor, "_ s c"]:
        """Remember the entity before, then let that of this pass flow: all steps are alike, and the
        null half takes part where it counts."""
        sampler = how.sampling.sampler or self.head.samplers[0]
        times = time_id(flow_times(sampler, how.budget)).tolist()
        guided = len(condition) > how.batch and how.scale != 1
        rows = 2 * how.batch if guided else how.batch

        def velocity(x: Tensor, step: int) -> Tensor:
            modulations = self.modulations(times[step:], condition, state)
            modulations = [numbers[:rows] for numbers in modulations]
            x = x.repeat(rows // how.batch, 1, 1)
            found = self.transformer(x, fed.predict, modulations, caches=state.cache)
            if not guided:
                return found
            conditional, null = found.chunk(2)
            return torch.lerp(null, conditional, how.scale)

        noise = how.noise * how.sampling.temperature
        with laid_out(self.weights(len(condition) * len(fed.predict), state)):
            self.step(tokens, condition, fed, state)
            return integrate(velocity, noise, sampler, how.budget)

    def step(
        self,
        tokens: Float[Tensor, "b n c"],
        condition: Int64[Tensor, "b"],
        fed: Pass,
        state: DecodingState,
    ) -> Float[Tensor, "b r c"]:
        """Feed the entity before, finished, and return its velocity, which nobody needs."""
        x = tokens[:, fed.tokens]
        if len(fed.tokens):
            modulations = self.modulations([CLEAN], condition, state)
            x = self.transformer(x, fed.tokens, modulations, caches=state.cache)
            state.cache.advance(len(fed.tokens))
        return x

    def weights(self, rows: int, state: DecodingState) -> Weights:
        """Return those of the trunk in another layout if it is the faster one for so many rows."""
        if self.device.type != "cpu" or rows > MOST_ROWS:
            return {}
        if not state.weights:
            state.weights = by_columns(self.trunk.linear_maps())
        return state.weights

    def modulations(
        self, times: Sequence[int], condition: Int64[Tensor, "b"], state: DecodingState
    ) -> list[Float[Tensor, "b 1 6 d"]]:
        """Return those of the first of whole `times`, made for as many of the others at once as
        there is room for, and kept for the entities to come."""
        made = state.modulations
        if times[0] not in made:
            blocks = len(state.cache.encoder.memory) + len(state.cache.decoder.memory)
            width = len(condition) * blocks * 6 * self.output.in_features
            room = max(1, MOST_AHEAD // width)
            ahead = [time for time in dict.fromkeys(times) if time not in made][:room]
            if len(made) + len(ahead) > room:
                made.clear()
            numbers = torch.tensor(ahead, device=condition.device).expand(len(condition), -1)
            by_block = self.trunk.modulations(self.conditions(condition, numbers))
            for i, time in enumerate(ahead):
                made[time] = [numbers[:, i : i + 1] for numbers in by_block]
        return made[times[0]]

    def compile_decoding(self, **options) -> None:
        # The context grows by an entity a pass: one graph of dynamic length serves them all.
        self.transformer = torch.compile(self.transformer, dynamic=True, **options)
