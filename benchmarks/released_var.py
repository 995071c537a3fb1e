"""Time vistok beside the structure of the released VAR (arXiv:2404.02905), with the same weights,
in turn: from class labels to tokens, and on to images.

python benchmarks/released_var.py

The other side is re-enacted here from descriptions of paper and repository. It is not their code,
so a figure compares structures, not repositories; what does not differ is vistok's own:

- keys and values of each block grow by concatenation at every scale;
- each block and the head make their modulations anew at every scale;
- maps are embedded, and places added, for both halves of guidance;
- logits of both halves in float32, guided there; a full sort of each position's for top-p;
- nearest neighbours, then a convolution, where the decoder doubles the resolution.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from released import linear, measured
from torch import Tensor, nn

from vistok.decoding import Corrected, Decoding, Noise, Schedule, decode
from vistok.generators import VAR
from vistok.layers.conv import Decoder
from vistok.layers.cosine_transformer import SHARPEST, CosineBlock
from vistok.options import run
from vistok.quantizers import VQ, MultiScale
from vistok.tokenizers import ConvTokenizer

CFG, TOP_K, TOP_P = 1.5, 900, 0.96  # of the published scores
OURS = Decoding(
    guidance=Schedule(f"linear(1,{1 + CFG})"), top_k=Corrected(TOP_K), top_p=Corrected(TOP_P)
)


@dataclass(frozen=True)
class Sizes:
    """Those of the transformer, and channels of the tokenizer; published are 64 x depth, 16 to 36,
    and 160."""

    width: int = 384
    depth: int = 8
    num_heads: int = 6
    channels: int = 32


def main(
    sizes: Sizes = Sizes(),
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    batches: tuple[int, ...] = (1, 4),
    repeats: int = 5,
    threads: int = 1,
    device: str = "cpu",
) -> None:
    """Check that both sides give the same ids and images, and print the times of each.

    Args:
        sizes: of both models
        scales: positions a side of each
        batches: images at once, for two rows each
        repeats: timed runs of each side, in turn, after one that is checked
        threads: of the CPU; the time of several is their sum
        device: cpu, whose own time counts, or cuda
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokenizer, model = (half.to(device) for half in models_of(sizes, scales))
    where, clock = f"CPU ({torch.backends.cpu.get_cpu_capability()})", time.process_time
    if model.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # images of both sides are compared
        where, clock = torch.cuda.get_device_name(), time_of_device
    print(
        f"{where}, float32, {threads} thread(s): time of a batch, medians of {repeats}; "
        f"{sizes.depth} x {sizes.width}, tokenizer of {sizes.channels} channels, "
        f"{model.spec.num_tokens} tokens\n\n"
        "| batch | to | released structure, ms | vistok, ms | times as fast | difference |\n"
        "|---|---|---|---|---|---|"
    )
    for batch in batches:
        labels = torch.arange(batch, device=device) % 1000
        for result, its in (("tokens", None), ("images", tokenizer)):
            sides = [partial(side, its, model, labels) for side in (released, ours)]
            difference, theirs, own = measured(f"batch {batch}, {result}", sides, repeats, clock)
            times = f"{1000 * theirs:.0f} | {1000 * own:.0f} | {theirs / own:.2f}"
            print(f"| {batch} | {result} | {times} | {difference:.1g} |", flush=True)


def time_of_device() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def models_of(sizes: Sizes, scales: tuple[int, ...]) -> tuple[ConvTokenizer, VAR]:
    """Return both with random matrices, of which new models have zeros and tiny ones."""
    codes = MultiScale(VQ(4096, 32, l2_normalise=False), scales)
    nn.init.normal_(codes.quantizer.embedding.weight)
    side = 16 * scales[-1]
    more = {"channels": sizes.channels, "z_channels": 32, "kernel_size": 3}
    tokenizer = ConvTokenizer(codes, side, **more).eval()
    names = list(map(str, range(1000)))
    shape = {"dim": sizes.width, "depth": sizes.depth, "num_heads": sizes.num_heads}
    model = VAR(tokenizer.spec, names, **shape).eval()
    for matrix in (parameter for parameter in model.parameters() if parameter.ndim > 1):
        nn.init.normal_(matrix, std=sizes.width**-0.5)
    model.take_codes(tokenizer)
    return tokenizer, model


def ours(tokenizer: ConvTokenizer | None, model: VAR, labels: Tensor, greedy: bool) -> Tensor:
    decoding = OURS.changed(temperature=Schedule(0)) if greedy else OURS
    tokens = decode(model, labels, Noise(0, range(len(labels))), decoding)
    return tokens if tokenizer is None else tokenizer.decode(tokens)


@torch.inference_mode()
def released(tokenizer: ConvTokenizer | None, model: VAR, labels: Tensor, greedy: bool) -> Tensor:
    """The structure of the released sampler over the weights of both models."""
    batch, codes, caches, drawn = len(labels), model.codes, {}, []
    condition = model.condition(model.condition.with_null(labels))
    place = model.position + model.level(model.level_of)
    x = condition + model.start + place[: len(model.start)]
    total = torch.zeros(batch, codes.dim, *codes.scales[-1], device=labels.device)
    for k, size in enumerate(codes.scales):
        for block in model.blocks:
            x = through(block, x, condition, caches)
        logits = linear(model.head.linear, head_rows(model, x, condition)).float()
        t = CFG * k / (len(codes.scales) - 1)
        logits = (1 + t) * logits[:batch] - t * logits[batch:]
        ids = logits.argmax(-1) if greedy else sampled(logits)
        drawn.append(ids)
        grid = F.embedding(ids, codes.quantizer.embedding.weight).unflatten(1, size)
        grid = grid.permute(0, 3, 1, 2)
        if k + 1 < len(codes.scales):
            grid = F.interpolate(grid, codes.scales[-1], mode="bicubic")
        smoother = codes.smoothers[codes.smoother_of[k]]
        smooth = F.conv2d(grid, smoother.weight, smoother.bias, padding=smoother.padding)
        total = total + grid * (1 - smoother.share) + smooth * smoother.share
        if k + 1 < len(codes.scales):
            means = F.interpolate(total, codes.scales[k + 1], mode="area")
            rows = means.flatten(2).transpose(1, 2).repeat(2, 1, 1)
            begin, end = model.ends[k + 1], model.ends[k + 2]
            x = linear(model.code_embed, rows) + place[begin:end]
    if tokenizer is None:
        return torch.cat(drawn, 1)
    images = to_pixels(tokenizer.decoder, tokenizer.post_quant_conv(total))
    return images.clamp(-1, 1).add(1).mul(0.5)


def sampled(logits: Tensor) -> Tensor:
    least = logits.topk(TOP_K, -1).values.amin(-1, keepdim=True)
    logits = logits.masked_fill(logits < least, -torch.inf)
    rising, order = logits.sort(-1)
    beyond = rising.softmax(-1).cumsum(-1) <= 1 - TOP_P
    beyond[..., -1:] = False
    logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    probs = logits.softmax(-1).flatten(0, 1)
    return torch.multinomial(probs, 1, replacement=True).view(logits.shape[:-1])


def through(block: CosineBlock, x: Tensor, condition: Tensor, caches: dict) -> Tensor:
    modulation = linear(block.modulation, F.silu(condition)).unflatten(-1, (6, -1)).unbind(2)
    gate, mlp_gate, scale, mlp_scale, shift, mlp_shift = modulation
    attention, qkv = block.attention, block.attention.qkv
    bias = torch.cat([qkv.q_bias, torch.zeros_like(qkv.q_bias), qkv.v_bias])
    heads = F.linear(normed(x, block.eps) * (1 + scale) + shift, qkv.weight, bias)
    heads = heads.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = heads.unbind(0)
    sharpness = attention.q_norm.sharpness.clamp(max=SHARPEST).exp()[:, None, None]
    query, key = F.normalize(query, dim=-1) * sharpness, F.normalize(key, dim=-1)
    if block in caches:
        key = torch.cat([caches[block][0], key], 2)
        value = torch.cat([caches[block][1], value], 2)
    caches[block] = key, value
    mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    x = x + linear(attention.out, mixed.transpose(1, 2).flatten(2)) * gate
    h = linear(block.fc1, normed(x, block.eps) * (1 + mlp_scale) + mlp_shift)
    return x + linear(block.fc2, F.gelu(h, approximate="tanh")) * mlp_gate


def head_rows(model: VAR, x: Tensor, condition: Tensor) -> Tensor:
    scale, shift = linear(model.head_modulation, F.silu(condition)).chunk(2, -1)
    return normed(x.float(), model.eps) * (1 + scale) + shift


def normed(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def to_pixels(decoder: Decoder, features: Tensor) -> Tensor:
    h = decoder.conv_in(features)
    for block in (*decoder.mid, *decoder.conv_blocks):
        if not hasattr(block, "resample"):
            h = convolved(block, h)
            continue
        for res, attend in zip(block.res, block.attn, strict=True):
            h = convolved(attend, convolved(res, h))
        if not isinstance(block.resample, nn.Identity):
            h = block.resample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return decoder.conv_out(F.silu(decoder.norm_out(h)))


def convolved(block: nn.Module, x: Tensor) -> Tensor:
    if not hasattr(block, "conv1"):  # attention, or nothing
        return block(x)
    h = block.conv1(F.silu(block.norm1(x)))
    return block.nin_shortcut(x) + block.conv2(F.silu(block.norm2(h)))


if __name__ == "__main__":
    run(main)
