"""Time decoding in several orders beside the floor of the device ("Roofline", Williams et al.,
2009): a pass reads the weights and the live part of the cache, a row fed meets every weight.

python benchmarks/decode.py --dim 768 --depth 12 --num_heads 12 --batch 1

The other sizes of LlamaGen: L 1024, 24, 16; XL 1280, 36, 20; XXL 1536, 48, 24; 3B 3200, 24, 32.
"""

import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.decoding import Decoding, Noise, Order, Plan, Schedule, decode
from vistok.generators import NAR, LlamaGen
from vistok.options import run
from vistok.tokens import TokenSpec

ORDERS = tuple(map(Order, ("raster", "zipar(4)", "par(4)", "nar")))


def main(
    orders: tuple[Order, ...] = ORDERS,
    dim: int = 256,
    depth: int = 4,
    num_heads: int = 8,
    side: int = 16,
    vocab_size: int = 16384,
    batch: int = 4,
    guidance: float = 2.0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: bool = False,
    repeats: int = 3,
    threads: int = 1,
) -> None:
    """Print passes, times and the distance to the floor of each order.

    Args:
        orders: of decoding, each by a model of that order, ZipAR by one of raster order
        dim: width of the transformer
        depth: its blocks; NAR has one more
        num_heads: its heads
        side: of the grid of tokens
        vocab_size: number of codes
        batch: images at once
        guidance: scale; 1 is off
        dtype: of weights, cache and activations
        compile: time the compiled loops beside the eager ones
        repeats: timed runs of each loop, in turn, after one that is not counted
        threads: of the CPU
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec, number = TokenSpec.ids((side, side), vocab_size), getattr(torch, dtype)
    labels = torch.arange(batch, device=device) % 10
    sequences = batch * (2 if guidance != 1 else 1)
    # All models run one code, whose versions are counted together: past the limit it stays eager.
    torch._dynamo.config.recompile_limit = 64
    loops, needs = {}, {}
    for order in orders:
        model = build(order, spec, dim=dim, depth=depth, num_heads=num_heads)
        nn.Module.to(model, device, number)  # diffusers' own `to` warns of any dtype
        plan, decoding = model.plan(order), Decoding(order, Schedule(guidance))
        needs[order] = len(plan), *work(model, plan, batch, sequences)
        state = model.new_state(sequences, plan)
        loops[order, "eager"] = decoder(model, labels, decoding, state)
        if compile:
            twin = copy.copy(model)  # of the same weights
            twin.compile_decoding()
            loops[order, "compiled"] = decoder(twin, labels, decoding, state)

    tokens = {key: loop() for key, loop in loops.items()}  # and all is warm
    rates, seconds = [], {key: [] for key in loops}
    for _ in range(repeats):
        rates.append(measured_rates(device, number))
        for key, loop in loops.items():
            seconds[key].append(timed(loop, device))
    reading, multiplying = (max(measured) for measured in zip(*rates, strict=True))

    cpu = f"CPU ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} processors)"
    print(
        f"{depth} x {dim}, {side}x{side} tokens of {vocab_size}, batch {batch}, guidance "
        f"{guidance:g}; {torch.cuda.get_device_name() if device.type == 'cuda' else cpu}, {dtype}, "
        f"{threads} thread(s): {reading / 1e9:.1f} GB/s read, {multiplying / 1e9:.0f} GFLOP/s\n"
    )
    print_table(needs, seconds, reading, multiplying, batch)
    for order in orders if compile else ():
        if differ := int((tokens[order, "eager"] != tokens[order, "compiled"]).sum()):
            print(f"\n{order}: {differ} of {batch * side**2} tokens differ when compiled")


def build(order: Order, spec: TokenSpec, **sizes: int) -> LlamaGen:
    """A model that decodes by `order`, with random weights."""
    learned = {"order": "raster" if order.name == "zipar" else str(order)}
    family, options = (NAR, {}) if order.name == "nar" else (LlamaGen, learned)
    model = family(spec, list("0123456789"), **options, **sizes).eval()
    nn.init.normal_(model.head.linear.weight, std=0.02)
    return model


def decoder(model: LlamaGen, labels: Tensor, decoding: Decoding, state) -> Callable[[], Tensor]:
    """The loop over one batch; its runs share a state, as a pipeline's do."""
    return lambda: decode(model, labels, Noise(0, range(len(labels))), decoding, state)


def work(model: LlamaGen, plan: Plan, batch: int, sequences: int) -> tuple[int, int]:
    """Return the bytes and the FLOPs of one batch. Each pass reads the weights and the keys and
    values that it sees, its own included; rows fed go through the blocks and attend to these, and
    predicted positions through the head, once for both halves of guidance."""
    blocks, head = matrices(model.blocks), matrices(model.head)
    attention = model.blocks[0].attention
    channels = 2 * len(model.blocks) * attention.head_dim  # of keys and values, for each head
    filled = seen = pairs = 0
    for fed in plan.passes:
        filled += fed.rows
        end = filled if fed.sees is None else fed.sees.shape[1]
        seen, pairs = seen + end, pairs + fed.rows * end
    read = len(plan) * (blocks + head) + sequences * seen * channels * attention.num_kv_heads
    fed_through = filled * blocks + pairs * channels * attention.num_heads
    multiplied = sequences * fed_through + batch * model.spec.num_tokens * head
    return read * model.dtype.itemsize, 2 * multiplied


def matrices(module: nn.Module) -> int:
    """Elements of what rows are multiplied by; the vectors of norms are left out."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def measured_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of reading more than any cache holds, and FLOP/s of a large matrix product."""
    cuda = device.type == "cuda"
    memory = torch.ones(2 ** (16 if cuda else 14), 4096, device=device)
    square = torch.randn(2 * [8192 if cuda else 2048], device=device).to(dtype)
    read = min(timed(f, device) for f in 5 * [memory.sum, lambda: memory @ memory[0]])
    multiplied = min(timed(f, device) for f in 5 * [lambda: square @ square])
    return 4 * memory.numel() / read, 2 * len(square) ** 3 / multiplied


def timed(function: Callable[[], Tensor], device: torch.device) -> float:
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def print_table(needs: dict, seconds: dict, reading: float, multiplying: float, batch: int) -> None:
    kinds = dict.fromkeys(kind for _, kind in seconds)
    columns = ["order", "passes", "floor, ms per image", "set by"]
    for kind in kinds:
        columns += [f"{kind}: ms per image", "images/s", "ms per pass", "times the floor"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for order, (passes, read, multiplied) in needs.items():
        floor, cause = max((read / reading, "reads"), (multiplied / multiplying, "products"))
        cells = [order, passes, f"{1000 * floor / batch:.2f}", cause]
        for kind in kinds:
            took = statistics.median(seconds[order, kind])
            found = 1000 * took / batch, batch / took, 1000 * took / passes, took / floor
            cells += [f"{value:.{2 if value >= 1 else 3}f}" for value in found]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    run(main)
