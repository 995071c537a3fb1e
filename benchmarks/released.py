"""Time vistok beside the structure of the released TiTok (arXiv:2406.07550), RAR (arXiv:2411.00776)
and MaskGIT (arXiv:2202.04200, as TiTok's authors sample it), with the same weights, in turn.

python benchmarks/released.py

The other side is re-enacted here from the papers' and repositories' descriptions. It is not their
code, so a figure compares structures, not repositories; what does not differ is vistok's own:

- TiTok: blocks on (rows, batch, width) through `nn.MultiheadAttention`, every row through the last
  one, distances to all codes; convolutions with channels first in memory, each after a call that
  pads, and after upsampling where there is any.
- RAR: caches that grow by concatenation; at each step the whole prefix embedded again, from tables
  repeated and gathered for the batch, and the modulations of each sequence made anew.
- MaskGIT: the two halves of guidance one after the other; Gumbel noise for every entry of the
  vocabulary, and a full sort.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.decoding import Decoding, Noise, Order, Schedule, decode, decode_masked
from vistok.generators import RAR, MaskGIT
from vistok.generators.rar import CONDITION_ROWS, EPS, RARBlock
from vistok.options import run
from vistok.quantizers import VQ
from vistok.tokenizers import TiTok, TwoStageTiTok
from vistok.tokenizers.maskgit_vqgan import Decoder, ResidualBlock
from vistok.tokenizers.titok import ViT
from vistok.tokens import TokenSpec

CODES = 4096, 12  # of TiTok, and their channels
SPARE_ROWS = 1024  # of RAR's published tables of positions, which are repeated with the others
RAR_GUIDANCE, RAR_POWER = 16.0, 2.75  # of RAR-B
PASSES, GUIDANCE, RANDOMNESS = 8, 4.5, 9.5  # of MaskGIT for TiTok-L-32
TOLERANCE = 1e-3  # between images, as a share of their standard deviation
linear = nn.Linear.forward  # the plain product; `vistok.layers.linear` has another for few rows
# Its name, and two functions of one result, which are told whether to decode greedily.
Case = tuple[str, Callable[[bool], Tensor], Callable[[bool], Tensor]]


@dataclass(frozen=True)
class Sizes:
    """Those of transformers, tokens of an image, and images at once, for one row each. By default
    TiTok is S-128, and the generators have the published widths or less, and fewer blocks."""

    width: int
    depth: int
    num_heads: int
    num_tokens: int
    batches: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.depth} x {self.width}, {self.num_tokens} tokens"


def main(
    systems: list[Literal["titok", "rar", "maskgit"]] = ("titok", "rar", "maskgit"),
    titok: Sizes = Sizes(512, 8, 8, 128, (1,)),
    rar: Sizes = Sizes(384, 6, 8, 256, (2, 8)),
    maskgit: Sizes = Sizes(768, 4, 16, 32, (4,)),
    image_size: int = 256,
    repeats: int = 5,
    threads: int = 1,
) -> None:
    """Check that both sides give the same ids and images, and print the times of each.

    Args:
        systems: what is timed
        titok: its sizes
        rar: its sizes
        maskgit: its sizes
        image_size: pixels of a side, of TiTok
        repeats: timed runs of each side, in turn, after one that is checked
        threads: of the CPU; the time of several is their sum
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cases = {"titok": titok_cases(titok, image_size), "rar": rar_cases(rar)}
    cases["maskgit"] = maskgit_cases(maskgit)
    print(
        f"CPU ({torch.backends.cpu.get_cpu_capability()}), float32, {threads} thread(s): CPU time "
        f"of a batch, medians of {repeats}\n\n"
        "| system | released structure, ms | vistok, ms | times as fast | difference |\n"
        "|---|---|---|---|---|"
    )
    for name, *sides in (case for system in systems for case in cases[system]):
        difference, released, ours = measured(name, sides, repeats)
        times = f"{1000 * released:.1f} | {1000 * ours:.1f} | {released / ours:.2f}"
        print(f"| {name} | {times} | {difference:.1g} |", flush=True)


@torch.no_grad()
def measured(
    name: str,
    sides: list[Callable],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> tuple[float, float, float]:
    """Return the largest difference of the results as a share of their deviation, and the median
    seconds of each side by `clock`. Raises `RuntimeError` if ids differ, or images more than they
    may."""
    theirs, ours = (side(True) for side in sides)
    difference = float((theirs - ours).abs().max() / ours.double().std())
    if not difference <= (TOLERANCE if ours.is_floating_point() else 0):
        raise RuntimeError(f"{name}: results are {difference:.1g} of their deviation apart")
    seconds = [], []
    for _ in range(repeats):
        for side, took in zip(sides, seconds, strict=True):
            began = clock()
            side(False)
            took.append(clock() - began)
    return difference, *map(statistics.median, seconds)


def titok_cases(sizes: Sizes, image_size: int) -> Iterator[Case]:
    """Encoding, and decoding by both kinds of decoders; nothing is drawn."""
    values = {"width": sizes.width, "depth": sizes.depth, "heads": sizes.num_heads}
    networks = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in values.items()}
    more = {"image_size": image_size, "num_latent_tokens": sizes.num_tokens}
    two, one = (
        TwoStageTiTok(VQ(*CODES), 2, **networks, **more),
        TiTok(VQ(*CODES), **networks, **more),
    )
    nn.init.normal_(two.vqgan.quantizer.embedding.weight)  # else all patches are as good as alike
    for batch in sizes.batches:
        images = torch.rand(batch, *two.input_shape)
        ids = torch.randint(two.spec.vocab_size, (batch, sizes.num_tokens))
        for method, model, x in ("encode", two, images), ("decode", two, ids), ("decode", one, ids):
            calls = (getattr(side, method) for side in (ReleasedTiTok(model), model.eval()))
            sides = (lambda _, call=call, x=x: call(x) for call in calls)
            yield f"{type(model).__name__}, {sizes}, batch {batch}: {method}", *sides


class ReleasedTiTok:
    """The structure of the released TiTok over the weights of `model`."""

    def __init__(self, model: TiTok):
        self.model, self.attention = model, {}
        for block in [*model.encoder.transformer, *model.decoder.transformer]:
            width, inward = block.attn.in_proj.in_features, block.attn.in_proj
            shared = nn.MultiheadAttention(width, block.attn.num_heads).eval()
            shared.in_proj_weight, shared.in_proj_bias = inward.weight, inward.bias
            shared.out_proj = block.attn.out_proj
            self.attention[block] = shared

    def encode(self, images: Tensor) -> Tensor:
        encoder, codes = self.model.encoder, self.model.quantizer.embedding.weight
        patches = encoder.patch_embed(images).flatten(2).permute(0, 2, 1)
        latents = self.model.latent_tokens.expand(len(images), -1, -1)
        rows = encoder.ln_post(self.transform(encoder, patches, latents)[:, -latents.shape[1] :])
        # The published weights read the memory of (rows, width) as (width, rows).
        mixed = rows.reshape(len(rows), -1, rows.shape[1]).permute(0, 2, 1)
        found = encoder.proj_out(mixed).flatten(0, 1)
        found, codes = F.normalize(found, dim=-1), F.normalize(codes, dim=-1)
        squares = found.square().sum(1, keepdim=True) + codes.square().sum(1)
        distances = squares - 2 * torch.einsum("nd,kd->nk", found, codes)
        return distances.argmin(1).view(len(images), -1)

    def decode(self, ids: Tensor) -> Tensor:
        model, decoder = self.model, self.model.decoder
        latents = F.normalize(F.embedding(ids, model.quantizer.embedding.weight), dim=-1)
        masked = decoder.mask_token.repeat(len(ids), decoder.num_patches, 1)
        rows = self.transform(decoder, masked, decoder.decoder_embed(latents))
        rows = decoder.ln_post(rows[:, 1 : 1 + decoder.num_patches])
        grid = 2 * [math.isqrt(decoder.num_patches)]
        images = decoder.head(rows.permute(0, 2, 1).reshape(len(ids), -1, *grid))
        if isinstance(model, TwoStageTiTok):
            codes = model.vqgan.quantizer.embedding.weight
            expected = torch.einsum("nchw,cd->ndhw", images.softmax(1), codes)
            images = to_pixels(model.vqgan.decoder, expected.contiguous())
        return images.clamp(0, 1)

    def transform(self, vit: ViT, patches: Tensor, latents: Tensor) -> Tensor:
        first = vit.class_embedding.expand(len(patches), 1, -1)
        grid = torch.cat([first, patches], 1) + vit.positional_embedding
        x = vit.ln_pre(torch.cat([grid, latents + vit.latent_token_positional_embedding], 1))
        x = x.permute(1, 0, 2)
        for block in vit.transformer:
            normed = block.ln_1(x)
            x = x + self.attention[block](normed, normed, normed, need_weights=False)[0]
            x = x + block.mlp(block.ln_2(x))
        return x.permute(1, 0, 2)


def to_pixels(decoder: Decoder, features: Tensor) -> Tensor:
    h = padded(decoder.conv_in, features)
    for block in decoder.mid:
        h = residual(block, h)
    for blocks, resample in zip(reversed(decoder.levels), reversed(decoder.resample), strict=True):
        for block in blocks:
            h = residual(block, h)
        if not isinstance(resample, nn.Identity):
            h = padded(resample.conv, F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return padded(decoder.conv_out, F.silu(decoder.norm_out(h)))


def residual(block: ResidualBlock, x: Tensor) -> Tensor:
    h = padded(block.conv1, F.silu(block.norm1(x)))
    h = padded(block.conv2, F.silu(block.norm2(h)))
    return h + (x if block.nin_shortcut is None else padded(block.nin_shortcut, h))


def padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if margin := conv.kernel_size[0] // 2:
        x = F.pad(x, 4 * [margin])
    return F.conv2d(x, conv.weight, conv.bias)


def rar_cases(sizes: Sizes) -> Iterator[Case]:
    decoding = Decoding(guidance=Schedule(f"power_cosine(1,{RAR_GUIDANCE},{RAR_POWER})"))
    return sampling_cases(RAR, 1024, sizes, released_rar, decode, decoding)


def maskgit_cases(sizes: Sizes) -> Iterator[Case]:
    guidance, temperature = Schedule(f"linear(1,{1 + GUIDANCE})"), Schedule("linear(1.3,0.5)")
    randomness = Schedule(f"linear({RANDOMNESS},0)")
    decoding = Decoding(Order(f"maskgit({PASSES})"), guidance, temperature, randomness=randomness)
    return sampling_cases(MaskGIT, 4096, sizes, released_maskgit, decode_masked, decoding)


def sampling_cases(
    family: type, codes: int, sizes: Sizes, released: Callable, loop: Callable, decoding: Decoding
) -> Iterator[Case]:
    """Sampling with the published settings, from random matrices, of which a new model has zeros;
    what is compared are the likeliest tokens."""
    spec, classes = TokenSpec.ids((sizes.num_tokens,), codes), list(map(str, range(1000)))
    model = family(spec, classes, dim=sizes.width, depth=sizes.depth, num_heads=sizes.num_heads)
    for matrix in (parameter for parameter in model.eval().parameters() if parameter.ndim > 1):
        nn.init.normal_(matrix, std=sizes.width**-0.5)
    greedy = decoding.changed(temperature=Schedule(0))
    for batch in sizes.batches:
        labels = torch.arange(batch)

        def ours(is_greedy: bool, labels: Tensor = labels) -> Tensor:
            return loop(model, labels, Noise(0, labels), greedy if is_greedy else decoding)

        theirs = partial(released, model, labels)
        yield f"{family.__name__}, {sizes}, batch {batch}", theirs, ours


def released_rar(model: RAR, labels: Tensor, greedy: bool) -> Tensor:
    """The structure of the released RAR over the weights of `model`."""
    n, condition = model.spec.num_tokens, model.condition.with_null(labels)
    positions = F.pad(model.position_embedding, (0, 0, 0, SPARE_ROWS))
    targets = F.pad(model.target_embedding, (0, 0, CONDITION_ROWS, SPARE_ROWS))
    ids, caches = torch.zeros(len(labels), 0, dtype=torch.long), {}
    for step in range(n):
        class_row = model.condition(condition)
        first = model.cls_token.expand(len(condition), -1, -1)
        x = torch.cat([first, class_row, model.token_embedding(ids.repeat(2, 1))], 1)
        rows = x.shape[1]
        x = x + gathered(positions, len(x), n)[:, :rows]
        ahead = gathered(targets, len(x), n)[:, CONDITION_ROWS : CONDITION_ROWS + rows - 1]
        x = x + torch.cat([torch.zeros_like(x[:, :1]), ahead], 1)
        by_row = class_row + model.index_embedding[:rows]
        if step > 0:
            x, by_row = x[:, -1:], by_row[:, -1:]
        for block in model.blocks:
            x = through(block, x, by_row, caches)
        scale, shift = linear(model.head_modulation, F.silu(by_row[:, -1:])).chunk(2, -1)
        hidden = F.layer_norm(x[:, -1:], x.shape[-1:], eps=EPS) * (1 + scale) + shift
        logits, null = linear(model.head.linear, hidden)[:, -1].chunk(2)
        share = (1 - torch.cos(torch.tensor(step / n) ** RAR_POWER * torch.pi)) / 2
        probs = (null + (logits - null) * (1 + (RAR_GUIDANCE - 1) * share)).softmax(-1)
        drawn = probs.argmax(-1, keepdim=True) if greedy else torch.multinomial(probs, 1)
        ids = torch.cat([ids, drawn], 1)
    return ids


def gathered(table: Tensor, batch: int, n: int) -> Tensor:
    """Return the rows of the condition and of n tokens in their order, for each of a batch."""
    first, rest, _ = table.repeat(batch, 1, 1).split([CONDITION_ROWS, n, SPARE_ROWS], 1)
    order = torch.arange(n).expand(batch, -1)[..., None]
    return torch.cat([first, rest.gather(1, order.expand_as(rest))], 1)


def through(block: RARBlock, x: Tensor, by_row: Tensor, caches: dict) -> Tensor:
    attention, modulation = block.attention, linear(block.modulation, F.silu(by_row))
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, -1)
    h = block.attention_norm(x) * (1 + scale) + shift
    heads = linear(attention.qkv, h).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if block in caches:
        key = torch.cat([caches[block][0], key], 2)
        value = torch.cat([caches[block][1], value], 2)
    caches[block] = key, value
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=x.shape[1] > 1)
    x = x + gate * linear(attention.out, mixed.transpose(1, 2).flatten(2))
    h = block.mlp_norm(x) * (1 + mlp_scale) + mlp_shift
    return x + mlp_gate * linear(block.fc2, F.gelu(linear(block.fc1, h)))


def released_maskgit(model: MaskGIT, labels: Tensor, greedy: bool) -> Tensor:
    """The structure of the released MaskGIT around the network of `model`."""
    n = model.spec.num_tokens
    ids = torch.full((len(labels), n), model.mask_token)
    for step in range(PASSES):
        after, guidance = (step + 1) / PASSES, GUIDANCE * step / PASSES
        randomness = 0 if greedy else RANDOMNESS * (1 - after)
        logits = linear(model.head.linear, model.hidden(ids, labels))
        if guidance != 0:
            null = linear(model.head.linear, model.hidden(ids, model.condition.null(labels)))
            logits = logits + guidance * (logits - null)
        logits = logits / (0.5 + 0.8 * (1 - after))
        masked = ids == model.mask_token
        drawn = (logits + randomness * gumbel_like(logits)).argmax(-1)
        confidence = logits.gather(-1, drawn[..., None])[..., 0].masked_fill(~masked, torch.inf)
        confidence = confidence + randomness * gumbel_like(confidence)
        ids = torch.where(masked, drawn, ids)
        if step + 1 < PASSES:
            count = min(int(masked[0].sum()) - 1, int(n * math.acos(after) * 2 / math.pi))
            doubtful = confidence <= confidence.sort(-1).values[:, max(count, 1) - 1, None]
            ids = ids.masked_fill(doubtful, model.mask_token)
    return ids


def gumbel_like(values: Tensor) -> Tensor:
    tiny = 1e-20
    return -(-torch.rand_like(values).clamp(min=tiny).log()).clamp(min=tiny).log()


if __name__ == "__main__":
    run(main)
