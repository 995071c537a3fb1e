"""Time vistok beside the structure of the released MAR (arXiv:2406.11838), in the chains of DiSA
(arXiv:2505.20297), and xAR (arXiv:2502.20388), with the same weights, in turn.

python benchmarks/released_continuous.py

The other side is re-enacted here from the papers' and repositories' descriptions, under the
published names of tensors, which vistok's importers read. It is not their code, so a figure
compares structures, not repositories:

- MAR: known tokens, hidden states and results found by their masks, and all positions through the
  last block; a head that at each step of diffusion embeds the time and maps the hidden state of
  every row anew, turns its schedules into tensors, and carries, with noise of its own, a chain of
  the unconditional half, which is never read.
- xAR: keys and values that grow by concatenation; each cell beginning with a call on it and the one
  before, under a mask; gate and value of the MLP by two products; times embedded and modulations
  made in every call; the unconditional half where guidance is off, too; a state of float64.

Attention is fused on both sides. Sizes are published widths or less, with fewer blocks.
"""

import math
import statistics
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.checkpoints.mar import generator as import_mar
from vistok.checkpoints.xar import generator as import_xar
from vistok.decoding import Decoding, Noise, Order, Sampler, Schedule, decode, decode_random
from vistok.options import run

CLASSES, CHANNELS, BUFFER = 1000, 16, 64
FEATURES, EPS = 256, 1e-6  # of embedded times, and of all norms
TIMES, LATEST = 1000, 950  # of diffusion, and the one at which chains begin
GUIDANCE = 2.9  # at the end of a linear schedule


@dataclass(frozen=True)
class Sizes:
    """Width of a transformer, blocks in each of its halves, heads, positions a side, images at
    once, and the steps of diffusion or flow in each pass."""

    width: int = 256
    depth: int = 4
    num_heads: int = 8
    side: int = 16
    batch: int = 1
    steps: Schedule = Schedule(25)


@dataclass(frozen=True)
class MARSizes(Sizes):
    head_width: int = 256
    head_depth: int = 3
    passes: int = 16

    def __str__(self) -> str:
        head = f"head {self.head_depth} x {self.head_width}"
        return f"MAR {2 * self.depth} x {self.width}, {head}, {self.passes} passes"


@dataclass(frozen=True)
class XARSizes(Sizes):
    cell: int = 8

    def __str__(self) -> str:
        cells = f"{(self.side // self.cell) ** 2} cells of {self.cell}x{self.cell}"
        return f"xAR {2 * self.depth} x {self.width}, {cells}"


HUNDRED, ANNEALED = map(Schedule, (100, "linear(50,5)"))
MAR = (
    *(MARSizes(batch=batch) for batch in (1, 4)),
    *(MARSizes(batch=batch, steps=HUNDRED) for batch in (1, 4)),
    *(MARSizes(passes=64, steps=steps) for steps in (HUNDRED, ANNEALED)),
)
XAR = (
    *(XARSizes(batch=batch) for batch in (1, 4)),
    XARSizes(width=512),
)


def main(
    mar: list[MARSizes] | None = None,
    xar: list[XARSizes] | None = None,
    repeats: int = 5,
    threads: int = 1,
) -> None:
    """Check that both sides give the same tokens, and print the times of each.

    Args:
        mar: sizes of MAR, for one row each; by default those of the table in the README
        xar: sizes of xAR likewise
        repeats: timed runs of each side, in turn, after one that is checked
        threads: of the CPU; the time of several is their sum
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(
        f"CPU ({torch.backends.cpu.get_cpu_capability()}), float32, {threads} thread(s): CPU time "
        f"of a batch, medians of {repeats}\n\n"
        "| system | batch | steps | released structure, ms | vistok, ms | times as fast "
        "| difference |\n|---|---|---|---|---|---|---|"
    )
    for sizes in (*(MAR if mar is None else mar), *(XAR if xar is None else xar)):
        difference, released, ours = measured(Pair(sizes), repeats)
        case = f"{sizes} | {sizes.batch} | {sizes.steps}"
        times = f"{1000 * released:.1f} | {1000 * ours:.1f} | {released / ours:.2f}"
        print(f"| {case} | {times} | {difference:.1g} |", flush=True)


class Pair:
    """Both sides with the same weights."""

    def __init__(self, sizes: MARSizes | XARSizes):
        is_mar = isinstance(sizes, MARSizes)
        self.network = ReleasedMAR(sizes) if is_mar else ReleasedXAR(sizes)
        randomise(self.network.eval().requires_grad_(False))
        weights, more = self.network.state_dict(), {"num_heads": sizes.num_heads}
        if is_mar:
            order, sampler = Order(f"mar({sizes.passes})"), f"ddpm({LATEST})"
            self.model, self.loop = import_mar(weights, **more), decode_random
        else:
            order, sampler = Order(f"cells({sizes.cell})"), "euler_maruyama"
            self.model, self.loop = import_xar(weights, order=str(order), **more), decode
        self.model.eval()
        self.labels, guidance = torch.arange(sizes.batch), Schedule(f"linear(1,{GUIDANCE})")
        self.decoding = Decoding(order, guidance, steps=sizes.steps, sampler=Sampler(sampler))

    def ours(self) -> Tensor:
        return self.loop(self.model, self.labels, Noise(0, self.labels), self.decoding)

    def released(self, draws: "Draws | None" = None) -> Tensor:
        steps = self.decoding.budgets(self.decoding.plan_of(self.model), self.model.head.steps)
        return self.network.sample(self.labels, steps, draws or Draws())


def randomise(network: nn.Module) -> None:
    """Draw all weights, of which a new model has zeros."""
    for name, parameter in network.named_parameters():
        is_table = parameter.ndim == 3 or name.startswith(("class_emb", "fake_latent"))
        mean = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean, 1.0 if is_table else parameter.shape[-1] ** -0.5)


@torch.no_grad()
def measured(pair: Pair, repeats: int) -> tuple[float, float, float]:
    """Return the largest difference of tokens of the same noise, as a share of their deviation, and
    the median seconds of each side. Raises `RuntimeError` if tokens differ by more than 1e-3."""
    ours, theirs = pair.ours(), pair.released(SharedDraws(Noise(0, pair.labels)))
    difference = float((theirs - ours).abs().max() / ours.double().std())
    if not difference <= 1e-3:
        raise RuntimeError(f"tokens are {difference:.1g} of their deviation apart")
    seconds = [], []
    for _ in range(repeats):
        for side, took in zip((pair.released, pair.ours), seconds, strict=True):
            began = time.process_time()
            side()
            took.append(time.process_time() - began)
    return difference, *map(statistics.median, seconds)


class Draws:
    """The random numbers of the other side: orders, and in each pass a start, then noise."""

    def orders(self, batch: int, n: int) -> Tensor:
        return torch.from_numpy(np.stack([np.random.permutation(n) for _ in range(batch)]))

    def start(self, steps: int, *shape: int) -> Tensor:
        return torch.randn(shape)

    def noise(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, dtype=dtype)


class SharedDraws(Draws):
    """Those of vistok: of each image uniforms that sort its positions, and in each pass its
    positions' normals, of which a chain takes as many as it has steps."""

    def __init__(self, streams: Noise):
        self.streams, self.batch = streams, len(streams.streams)

    def orders(self, batch: int, n: int) -> Tensor:
        return self.streams.uniform(n).argsort(1)

    def start(self, steps: int, *shape: int) -> Tensor:
        drawn = self.streams.normal(math.prod(shape[:-1]) // self.batch, steps, shape[-1])
        # The released MAR also draws for its last step, which adds no noise.
        self.of_pass = iter(F.pad(drawn, (0, 0, 0, 1)).unbind(2))
        return self.noise(*shape)

    def noise(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn = next(self.of_pass).reshape(-1, shape[-1])
        # Both halves of a batch get the same.
        return drawn.repeat(math.prod(shape[:-1]) // len(drawn), 1).view(shape).to(dtype)


class TimeMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        half = FEATURES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = times.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class ViTBlock(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        qkv, proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": proj})
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.ModuleDict({"fc1": up, "fc2": down})

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        mixed = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))
        x = x + self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class DiffusionBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class DiffusionMLP(nn.Module):
    def __init__(self, hidden_dim: int, width: int, depth: int):
        super().__init__()
        self.time_embed, self.cond_embed = TimeMLP(width), nn.Linear(hidden_dim, width)
        self.input_proj = nn.Linear(CHANNELS, width)
        self.res_blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        last = {"adaLN_modulation": modulation, "linear": nn.Linear(width, 2 * CHANNELS)}
        self.final_layer = nn.ModuleDict(last)

    def forward(self, x: Tensor, times: Tensor, hidden: Tensor) -> Tensor:
        condition = self.time_embed(times) + self.cond_embed(hidden)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition).chunk(2, -1)
        x = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
        return self.final_layer["linear"](x)


@lru_cache  # chains are there before any sampling
class Chain:
    """Times of an ancestral chain, and its schedules in NumPy's float64."""

    def __init__(self, steps: int, latest: int = LATEST):
        stride = (TIMES - 1) / max(1, steps - 1)
        places = np.cumsum([0.0, *[stride] * (steps - 1)])
        self.times = sorted({min(round(place), latest) for place in places})
        share = np.cos((np.arange(TIMES + 1) / TIMES + 0.008) / 1.008 * np.pi / 2) ** 2
        kept = np.cumprod(1 - np.minimum(1 - share[1:] / share[:-1], 0.999))[self.times]
        before = np.append(1.0, kept[:-1])
        beta = 1 - kept / before
        self.variance = beta * (1 - before) / (1 - kept)
        self.log_variance = np.log(np.append(self.variance[1], self.variance[1:]))
        self.log_beta = np.log(beta)
        self.of_sample, self.of_noise = np.sqrt(1 / kept), np.sqrt(1 / kept - 1)
        self.to_start = beta * np.sqrt(before) / (1 - kept)
        self.to_sample = (1 - before) * np.sqrt(1 - beta) / (1 - kept)


def at(schedule: np.ndarray, steps: Tensor, like: Tensor) -> Tensor:
    return torch.from_numpy(schedule)[steps].float()[:, None].expand(like.shape)


def diffused(net: nn.Module, hidden: Tensor, scale: float, steps: int, draws: Draws) -> Tensor:
    """Return the tokens of `hidden`, whose second half is the null one."""
    chain, rows = Chain(steps), len(hidden) // 2
    x = draws.start(len(chain.times), rows, CHANNELS).repeat(2, 1)
    for step in reversed(range(len(chain.times))):
        steps = torch.tensor([step] * len(x))
        times = torch.tensor(chain.times)[steps]
        noise, share = net(x[:rows].repeat(2, 1), times, hidden).chunk(2, 1)
        conditional, null = noise.chunk(2)
        noise = (null + scale * (conditional - null)).repeat(2, 1)
        low, high = at(chain.log_variance, steps, x), at(chain.log_beta, steps, x)
        share = (share + 1) / 2
        log_variance = share * high + (1 - share) * low
        start = at(chain.of_sample, steps, x) * x - at(chain.of_noise, steps, x) * noise
        mean = at(chain.to_start, steps, x) * start + at(chain.to_sample, steps, x) * x
        at(chain.variance, steps, x)  # asked for, not read
        fresh = draws.noise(*x.shape)
        x = mean + (steps != 0).float()[:, None] * (0.5 * log_variance).exp() * fresh
    return x[:rows]


class ReleasedMAR(nn.Module):
    """The structure of the released MAR."""

    def __init__(self, sizes: MARSizes):
        super().__init__()
        width, self.n = sizes.width, sizes.side**2
        self.class_emb = nn.Embedding(CLASSES, width)
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.z_proj, self.z_proj_ln = nn.Linear(CHANNELS, width), nn.LayerNorm(width, eps=EPS)
        rows = BUFFER + self.n
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, rows, width))
        self.encoder_norm, self.decoder_norm = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, rows, width))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, self.n, width))
        self.encoder_blocks, self.decoder_blocks = (
            nn.ModuleList(ViTBlock(width, sizes.num_heads) for _ in range(sizes.depth))
            for _ in range(2)
        )
        net = DiffusionMLP(width, sizes.head_width, sizes.head_depth)
        self.diffloss = nn.ModuleDict({"net": net})

    def hidden(self, tokens: Tensor, masked: Tensor, classes: Tensor) -> Tensor:
        batch, x = len(tokens), self.z_proj(tokens)
        x = torch.cat([x.new_zeros(batch, BUFFER, x.shape[-1]), x], 1)
        x[:, :BUFFER] = classes[:, None]
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        known = torch.cat([masked.new_zeros(batch, BUFFER), masked], 1) == 0
        x = x[known.nonzero(as_tuple=True)].reshape(batch, -1, x.shape[-1])
        for block in self.encoder_blocks:
            x = block(x)
        x = self.decoder_embed(self.encoder_norm(x))
        filled = self.mask_token.repeat(batch, BUFFER + self.n, 1)
        filled[known.nonzero(as_tuple=True)] = x.flatten(0, 1)
        x = filled + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, BUFFER:] + self.diffusion_pos_embed_learned

    def sample(self, labels: Tensor, steps: list[int], draws: Draws) -> Tensor:
        """Return tokens (B, h, w, C) in as many passes as there are numbers of `steps`."""
        batch, n, passes = len(labels), self.n, len(steps)
        orders = draws.orders(batch, n)
        masked, tokens = torch.ones(batch, n), torch.zeros(batch, n, CHANNELS)
        for k in range(passes):
            both = torch.cat([self.class_emb(labels), self.fake_latent.repeat(batch, 1)])
            hidden = self.hidden(tokens.repeat(2, 1, 1), masked.repeat(2, 1), both)
            left = math.floor(n * math.cos(math.pi / 2 * (k + 1) / passes))
            left = max(1, min(int(masked[0].sum()) - 1, left))
            after = torch.zeros(batch, n).scatter(-1, orders[:, :left], 1.0)
            wanted = masked == 1 if k == passes - 1 else masked.bool() ^ after.bool()
            masked = after
            hidden = hidden[wanted.repeat(2, 1).nonzero(as_tuple=True)]
            scale = 1 + (GUIDANCE - 1) * (n - left) / n
            drawn = diffused(self.diffloss["net"], hidden, scale, steps[k], draws)
            tokens[wanted.nonzero(as_tuple=True)] = drawn
        return tokens.unflatten(1, 2 * [math.isqrt(n)])


def normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class Rope(nn.Module):
    """Turns by row and column, whose tables every block holds for itself."""

    def __init__(self, rows: Tensor, columns: Tensor, width: int):
        super().__init__()
        frequencies = 10000 ** (-4 * torch.arange(width // 4) / width)
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], 1)
        angles = angles.repeat_interleave(2, 1)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor, places: slice) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], -1).flatten(-2)
        return x * self.freqs_cos[places] + turned * self.freqs_sin[places]


class CellBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, where: tuple[Tensor, Tensor]):
        super().__init__()
        self.num_heads, hidden_dim = num_heads, int(width * 4 * 2 / 3)
        qkv, proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        rope = Rope(*where, width // num_heads)
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": proj, "rope": rope})
        gate, value = (nn.Linear(width, hidden_dim) for _ in range(2))
        self.mlp = nn.ModuleDict(
            {"fc1_g": gate, "fc1_x": value, "fc2": nn.Linear(hidden_dim, width)}
        )
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None, places: slice, cache):
        """`x` (batch, cells, positions, width); `condition` (batch, cells, width)."""
        modulation = self.ada_lin(condition)[:, :, None].chunk(6, -1)
        gate, mlp_gate, scale, mlp_scale, shift, mlp_shift = modulation
        x = x + gate * self.attend(normed(x) * (1 + scale) + shift, mask, places, cache)
        h, mlp = normed(x) * (1 + mlp_scale) + mlp_shift, self.mlp
        return x + mlp_gate * mlp["fc2"](F.gelu(mlp["fc1_g"](h)) * mlp["fc1_x"](h))

    def attend(self, x: Tensor, mask: Tensor | None, places: slice, cache) -> Tensor:
        heads = self.attn["qkv"](x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        query, key = self.attn["rope"](query, places), self.attn["rope"](key, places)
        if self in cache:
            key = torch.cat([cache[self][0], key], 2)
            value = torch.cat([cache[self][1], value], 2)
        if x.shape[1] > 1:  # the cell before is finished, and stays
            finished = places.stop - x.shape[2]
            cache[self] = key[:, :, :finished], value[:, :, :finished]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.attn["proj"](mixed.transpose(1, 2).flatten(2)).view_as(x)


class ReleasedXAR(nn.Module):
    """The structure of the released xAR."""

    def __init__(self, sizes: XARSizes):
        super().__init__()
        width, n, self.rows = sizes.width, sizes.side**2, sizes.cell**2
        cells = Order(f"cells({sizes.cell})")((sizes.side, sizes.side)).passes
        self.places = torch.cat([cell.predict for cell in cells])  # in the grid
        where = self.places // sizes.side, self.places % sizes.side
        self.class_emb, self.time_embed = nn.Embedding(CLASSES + 1, width), TimeMLP(width)
        self.z_proj, self.z_proj_ln = nn.Linear(CHANNELS, width), nn.RMSNorm(width, EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, n, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, n, width))
        self.encoder_norm, self.decoder_norm = nn.RMSNorm(width, EPS), nn.RMSNorm(width, EPS)
        self.decoder_embed, self.pred = nn.Linear(width, width), nn.Linear(width, CHANNELS)
        self.encoder_blocks, self.decoder_blocks = (
            nn.ModuleList(CellBlock(width, sizes.num_heads, where) for _ in range(sizes.depth))
            for _ in range(2)
        )
        cell = torch.arange(n) // self.rows
        mask = torch.zeros(n, n).masked_fill(cell[:, None] < cell, -torch.inf)
        self.register_buffer("mask", mask[None, None])

    def velocity(
        self, x: Tensor, times: Tensor, labels: Tensor, cell: int, first: bool, cache: dict
    ) -> Tensor:
        """Return that of the last of `x` (batch, cells, positions, channels), number `cell`."""
        end = (cell + 1) * self.rows
        places = slice(end - x.shape[1] * self.rows, end)
        mask = self.mask[:, :, places, :end] if first else None
        ids = (1000 * times.float()).floor()
        embedded = self.time_embed(ids.repeat(len(x))).unflatten(0, (len(x), -1))
        condition = self.class_emb(labels)[:, None] + embedded
        shape = 1, x.shape[1], self.rows, -1
        h = self.z_proj(x.float()) + self.encoder_pos_embed_learned[:, places].view(shape)
        h = self.z_proj_ln(h)
        for block in self.encoder_blocks:
            h = block(h, condition, mask, places, cache)
        h = self.decoder_embed(self.encoder_norm(h))
        h = h + self.decoder_pos_embed_learned[:, places].view(shape)
        for block in self.decoder_blocks:
            h = block(h, condition, mask, places, cache)
        return self.pred(self.decoder_norm(h))[:, -1].double()

    def sample(self, labels: Tensor, steps: list[int], draws: Draws) -> Tensor:
        """Return tokens (B, h, w, C); `steps` are those of each cell."""
        both = torch.cat([labels, torch.full_like(labels, self.class_emb.num_embeddings - 1)])
        finished, cache, shape = [], {}, (len(labels), self.rows, CHANNELS)
        for cell in range(len(steps)):
            scale = 1 + (GUIDANCE - 1) * cell / (len(steps) - 1)
            x = draws.start(steps[cell], *shape).double()
            times = [*torch.linspace(1, 0.04, steps[cell], dtype=torch.float64), torch.zeros(())]
            for step in range(steps[cell]):
                now, after = times[step : step + 2]
                fed, at_times, first = x[:, None], now[None], step == 0
                if first and cell > 0:
                    fed = torch.stack([finished[-1].double(), x], 1)
                    at_times = torch.stack([torch.zeros_like(now), now])
                fed = fed.repeat(2, 1, 1, 1)
                velocity = self.velocity(fed, at_times, both, cell, first, cache)
                conditional, null = velocity.chunk(2)
                velocity = null + scale * (conditional - null) if scale > 1 else conditional
                x = x + ((2 - now) * velocity + x) * (after - now)
                if step < steps[cell] - 1:
                    spread = (2 * now).sqrt() * (now - after).sqrt()
                    x = x + spread * draws.noise(*shape, dtype=torch.float64)
            finished.append(x.float())
        tokens = torch.cat(finished, 1)[:, self.places.argsort()]
        return tokens.unflatten(1, 2 * [math.isqrt(tokens.shape[1])])


if __name__ == "__main__":
    run(main)
