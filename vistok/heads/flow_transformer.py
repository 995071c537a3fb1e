"""The flow head of FlowAR (Ren et al., 2024, arXiv:2412.15205): all tokens of one scale flow from
noise to data together, by a velocity that a transformer over them finds.

What they flow to is conditioned on the hidden states of the scale's positions. These modulate the
blocks along with the time (S) or, in the larger models, the MLPs alone, and are attended to (L, H).
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from vistok.decoding.flow import flow_times, integrate, time_id
from vistok.decoding.noise import Noise
from vistok.decoding.samplers import Sampler
from vistok.decoding.sampling import Sampling
from vistok.decoding.schedules import Schedule
from vistok.errors import IncompatibleTokensError, UserError
from vistok.heads.base import PLAIN, ValueHead
from vistok.layers.gated_transformer import EPS, GEGLU, GatedBlock, gated_width, modulated
from vistok.layers.linear import Linear
from vistok.layers.norms import RMSNorm
from vistok.layers.positions import TimeEmbedding
from vistok.layers.pyramid import pyramid_coordinates
from vistok.layers.rotary import rotary_factors, rotate
from vistok.layers.transformer import Attention
from vistok.models import register_to_config
from vistok.tokens import TokenSpec

HEAD_DIM = 64  # of attention
KeysValues = tuple[Float[Tensor, "b heads s hd"], Float[Tensor, "b heads s hd"]]


@dataclass(frozen=True)
class Given:
    """What a scale's flow is conditioned on beside time, and does not change along it: a vector for
    each token, what each block attends to, and where the tokens lie."""

    vectors: Float[Tensor, "b s w"]
    attended: list[KeysValues | None]
    rotary: Float[Tensor, "2 s hd"]

    def first(self, batch: int) -> "Given":
        """Return that of the first `batch` samples."""
        attended = [kv and (kv[0][:batch], kv[1][:batch]) for kv in self.attended]
        return Given(self.vectors[:batch], attended, self.rotary)


class JointBlock(GatedBlock):
    """The trunk's block, modulated by time and hidden state."""

    def __init__(self, width: int, hidden_dim: int):
        super().__init__(width, width // HEAD_DIM, gated_width(width), qkv_bias=False)

    def attended(self, hidden: Float[Tensor, "b s d"], rotary: Float[Tensor, "2 s hd"]) -> None:
        """Return None: hidden states are not attended to."""

    def forward(
        self, x: Float[Tensor, "b s w"], time: Float[Tensor, "_ 1 w"], given: Given, attended: None
    ) -> Float[Tensor, "b s w"]:
        return super().forward(x, time + given.vectors, rotary=given.rotary)


class CrossBlock(nn.Module):
    """Attention among the tokens, modulated by time; attention to the hidden states; gated MLP,
    modulated by both."""

    def __init__(self, width: int, hidden_dim: int):
        super().__init__()
        heads = width // HEAD_DIM
        self.attention = Attention(width, heads, heads, dropout=0.0, out_bias=True)
        self.attention_modulation = Linear(width, 3 * width, bias=True)
        self.cross_attention = CrossAttention(width, hidden_dim)
        self.feed_forward = GEGLU(width, gated_width(width))
        self.feed_forward_modulation = Linear(width, 3 * width, bias=True)

    def attended(
        self, hidden: Float[Tensor, "b s d"], rotary: Float[Tensor, "2 s hd"]
    ) -> KeysValues:
        return self.cross_attention.keys_values(hidden, rotary)

    def forward(
        self,
        x: Float[Tensor, "b s w"],
        time: Float[Tensor, "_ 1 w"],
        given: Given,
        attended: KeysValues,
    ) -> Float[Tensor, "b s w"]:
        gate, scale, shift = self.attention_modulation(silu(time)).chunk(3, dim=-1)
        x = x + gate * self.attention(modulated(x, scale, shift), rotary=given.rotary)
        x = x + self.cross_attention(x, attended, given.rotary)
        by_both = self.feed_forward_modulation(silu(time + given.vectors))
        gate, scale, shift = by_both.chunk(3, dim=-1)
        return x + gate * self.feed_forward(modulated(x, scale, shift))


class CrossAttention(nn.Module):
    """Attention of tokens to hidden states at the same places, both normalised."""

    def __init__(self, width: int, hidden_dim: int):
        super().__init__()
        self.norm, self.hidden_norm = RMSNorm(width, eps=EPS), RMSNorm(hidden_dim, eps=EPS)
        self.query = Linear(width, width)
        self.key_value = Linear(hidden_dim, 2 * width)
        self.out = Linear(width, width, bias=True)

    def keys_values(
        self, hidden: Float[Tensor, "b s d"], rotary: Float[Tensor, "2 s hd"]
    ) -> KeysValues:
        key, value = map(_heads, self.key_value(self.hidden_norm(hidden)).chunk(2, dim=-1))
        return rotate(key, rotary), value

    def forward(
        self, x: Float[Tensor, "b s w"], attended: KeysValues, rotary: Float[Tensor, "2 s hd"]
    ) -> Float[Tensor, "b s w"]:
        query = rotate(_heads(self.query(self.norm(x))), rotary)
        mixed = scaled_dot_product_attention(query, *attended)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FlowTransformerHead(ValueHead):
    """Args:
    width, depth: of the transformer; the width is a multiple of 64, that of an attention head.
    cross: whether the tokens attend to the hidden states, which then modulate MLPs alone.

    The published sizes (width, depth, cross): S 1024, 2, false; L 1024, 12, true; H 1536, 12, true.

    Guidance acts on the velocity, where the sampler allows it; a temperature multiplies the noise
    from which the flow starts. Arithmetic is float32 under autocast.
    """

    samplers = ("flowar", "euler")
    steps = Schedule(25)

    @register_to_config
    def __init__(self, width: int = 1024, depth: int = 2, cross: bool = False):
        super().__init__()
        if width % HEAD_DIM:
            raise UserError(f"FlowTransformerHead: width {width} must be a multiple of {HEAD_DIM}")
        self.width, self.depth, self.cross = width, depth, cross

    def build(self, hidden_dim: int, spec: TokenSpec) -> None:
        if not spec.is_scales:
            raise IncompatibleTokensError(
                f"FlowTransformerHead draws the scales of a pyramid jointly, not {spec}: choose a "
                "generator of scales, as FlowAR, or another head"
            )
        (channels,), sides = spec.value_shape, [side for side, _ in spec.shape]
        self.input = Linear(channels, self.width, bias=True)
        self.time_embedding = TimeEmbedding(self.width)
        self.condition = Linear(hidden_dim, self.width, bias=True)
        block = CrossBlock if self.cross else JointBlock
        self.blocks = nn.ModuleList(block(self.width, hidden_dim) for _ in range(self.depth))
        self.output_modulation = Linear(self.width, 2 * self.width, bias=True)
        self.output = Linear(self.width, channels, bias=True)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        ends = pairwise(accumulate((side * side for side in sides), initial=0))
        self.rows_of_side = dict(zip(sides, ends, strict=True))
        rotary = rotary_factors(pyramid_coordinates(sides), HEAD_DIM)
        self.register_buffer("rotary", rotary, persistent=False)

    def given(self, hidden: Float[Tensor, "b s d"]) -> Given:
        """Return what the hidden states of one scale make the flow of its tokens depend on."""
        begin, end = self.rows_of_side[isqrt(hidden.shape[1])]
        hidden, rotary = hidden.to(self.input.weight.dtype), self.rotary[:, begin:end]
        attended = [block.attended(hidden, rotary) for block in self.blocks]
        return Given(self.condition(hidden), attended, rotary)

    def forward(
        self, x: Float[Tensor, "b s c"], time: Float[Tensor, "_ 1 w"], given: Given
    ) -> Float[Tensor, "b s c"]:
        """Return the velocity, noise less data, at points `x` of the flow; `time` is embedded, one
        for each sample or for all."""
        h = self.input(x.to(self.input.weight.dtype))
        for block, attended in zip(self.blocks, given.attended, strict=True):
            h = block(h, time, given, attended)
        shift, scale = self.output_modulation(silu(time + given.vectors)).chunk(2, dim=-1)
        return self.output(modulated(h, scale, shift)).float()

    def loss(
        self, hidden: Float[Tensor, "b s d"], target: Float[Tensor, "b s c"]
    ) -> Float[Tensor, "b s"]:
        """Return the flow matching loss of the tokens of one scale, at one time for each sample."""
        times = torch.rand(len(target), device=target.device)
        return self.loss_at(hidden, target, times, torch.randn_like(target))

    def loss_at(
        self,
        hidden: Float[Tensor, "b s d"],
        target: Float[Tensor, "b s c"],
        times: Float[Tensor, "b"],
        noise: Float[Tensor, "b s c"],
    ) -> Float[Tensor, "b s"]:
        """Return the mean squared error of the velocity at `times` in [0, 1], of which 1 is
        noise."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = torch.lerp(target, noise, times[:, None, None])
            time = self.time_embedding(time_id(times))[:, None]
            return (self(x, time, self.given(hidden)) - (noise - target)).square().mean(-1)

    def draw_noise(
        self, noise: Noise, num_tokens: int, sampling: Sampling = PLAIN, budget: int = 1
    ) -> Float[Tensor, "b n 1 c"]:
        return noise.normal(num_tokens, 1, self.output.out_features)

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
        sampler = sampling.sampler or Sampler(self.samplers[0])
        times = flow_times(sampler, budget)[:-1]
        latest = sampler.numbers[0] if sampler.numbers else 1.0
        guides = [null is not None and time <= latest for time in times.tolist()]
        with torch.autocast(hidden.device.type, enabled=False):
            embedded = self.time_embedding(time_id(times).to(hidden.device))[:, None, None]
            both = self.given(hidden if null is None else torch.cat([hidden, null]))
            conditional = both.first(len(hidden))

            def velocity(x: Tensor, step: int) -> Tensor:
                if not guides[step]:  # the null half would not reach the result
                    return self(x, embedded[step], conditional)
                halves = self(x.repeat(2, 1, 1), embedded[step], both).chunk(2)
                return torch.lerp(halves[1], halves[0], scale)

            return integrate(velocity, sampling.temperature * noise, sampler, budget)


def _heads(x: Float[Tensor, "b s w"]) -> Float[Tensor, "b heads s hd"]:
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
