"""The network of MAR's head (Li et al., 2024, arXiv:2406.11838): a residual MLP on one token, told
the time and the hidden state by adaptive layer norms (Peebles and Xie, 2022, arXiv:2212.09748).

Most of its weights make the modulations, which do not depend on the token: those of many steps are
made at once, in one matrix product that reads these weights once.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from vistok.layers.linear import Linear
from vistok.layers.positions import TimeEmbedding

EPS = 1e-6  # of all layer norms
# Modulations are made for as many steps at once as have so many rows in all: enough for a matrix
# product at full speed, and little memory.
ROWS_AHEAD = 512


class DenoiserBlock(nn.Module):
    """x + gate * MLP(norm(x) * scale + shift)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc1 = Linear(width, width, bias=True)
        self.fc2 = Linear(width, width, bias=True)

    def forward(
        self,
        x: Float[Tensor, "*few w"],
        shift: Float[Tensor, "*rows w"],
        scale: Float[Tensor, "*rows w"],
        gate: Float[Tensor, "*rows w"],
    ) -> Float[Tensor, "*rows w"]:
        modulated = torch.addcmul(shift, self.norm(x), scale)
        return torch.addcmul(x, gate, self.fc2(silu(self.fc1(modulated))))


class Denoiser(nn.Module):
    """Noisy tokens, times and hidden states to `outputs` numbers for each token, zero at the start.

    A modulation is a shift, a scale and a gate for each block, then a shift and a scale for the
    output; scales are learned about 1.
    """

    def __init__(self, channels: int, hidden_dim: int, width: int, depth: int, outputs: int):
        super().__init__()
        self.time = TimeEmbedding(width)
        self.condition = Linear(hidden_dim, width, bias=True)
        self.input = Linear(channels, width, bias=True)
        self.blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(depth))
        self.modulation = Linear(width, (3 * depth + 2) * width, bias=True)
        self.output = Linear(width, outputs, bias=True)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.output.weight)
        with torch.no_grad():
            self.scales(self.modulation.bias).fill_(1)

    def scales(self, modulation: Float[Tensor, "m"]) -> Float[Tensor, "scales w"]:
        """Return a view of the scales, of each block and of the output."""
        return modulation.unflatten(-1, (-1, self.input.out_features))[1::3]

    def forward(
        self,
        x: Float[Tensor, "*rows c"],
        times: Real[Tensor, "*rows"],
        hidden: Float[Tensor, "*some d"],
    ) -> Float[Tensor, "*rows o"]:
        """`hidden` states serve several copies of their tokens where they have fewer axes."""
        condition = self.condition(hidden.to(self.condition.weight.dtype))
        embedded = self.time(times.flatten()).unflatten(0, times.shape)
        return self.denoised(x, self.modulation(silu(condition + embedded)))

    def denoised(
        self, x: Float[Tensor, "*few c"], modulation: Float[Tensor, "*rows m"]
    ) -> Float[Tensor, "*rows o"]:
        """The network where modulations are known; one token may serve several of them. The
        result is float32."""
        x = self.input(x.to(self.input.weight.dtype))
        numbers = modulation.unflatten(-1, (-1, x.shape[-1])).unbind(-2)
        for i, block in enumerate(self.blocks):
            x = block(x, *numbers[3 * i : 3 * i + 3])
        shift, scale = numbers[-2:]
        normed = layer_norm(x, x.shape[-1:], eps=EPS)
        return self.output(torch.addcmul(shift, normed, scale)).float()

    def at(
        self,
        times: Real[Tensor, "t"],
        hidden: Float[Tensor, "*rows d"],
        null: Float[Tensor, "*rows d"] | None = None,
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield, for each of `times`, the network as a function of the tokens (*rows, c) alone. It
        returns (1, *rows, o) or, with the hidden states of the null condition, (2, *rows, o)."""
        halves = hidden[None] if null is None else torch.stack([hidden, null])
        condition = self.condition(halves.to(self.condition.weight.dtype))
        rows = max(1, condition[..., 0].numel())
        for some in self.time(times).split(max(1, ROWS_AHEAD // rows)):
            embedded = some.view(len(some), *[1] * hidden.ndim, -1)
            for modulation in self.modulation(silu(condition + embedded)):
                yield partial(self.denoised, modulation=modulation)


def guided(halves: Float[Tensor, "h *rows c"], scale: float) -> Float[Tensor, "*rows c"]:
    """Return the conditional prediction, the first, led away from the null one if there is one."""
    return halves[0] if len(halves) == 1 else torch.lerp(halves[1], halves[0], scale)
