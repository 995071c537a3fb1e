"""Time decoding in several orders beside the floor of the device (`vistok.roofline`).

python benchmarks/decode.py --dim 768 --depth 12 --num_heads 12 --batch 1

The other sizes of LlamaGen: L 1024, 24, 16; XL 1280, 36, 20; XXL 1536, 48, 24; 3B 3200, 24, 32.
"""

import copy
import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.decoding import Decoding, Noise, Order, Schedule, decode
from vistok.generators import NAR, LlamaGen
from vistok.options import run
from vistok.roofline import Rates, Work, count_work, measured_rates, timed
from vistok.speed import device_name, in_turn
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
        repeats: timed runs of each loop, in turn, after a round that is not counted
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
        state = model.new_state(sequences, plan)
        loops[order, "eager"] = loop = decoder(model, labels, decoding, state)
        needs[order] = len(plan), count_work(loop, model)[0]
        if compile:
            twin = copy.copy(model)  # of the same weights
            twin.compile_decoding()
            loops[order, "compiled"] = decoder(twin, labels, decoding, state)

    tokens = {key: loop() for key, loop in loops.items()}
    rates = []
    runs = [lambda loop=loop: timed(loop, device)[:1] for loop in loops.values()]
    medians = in_turn(runs, repeats, lambda: rates.append(measured_rates(device, number)))
    best = functools.reduce(Rates.best, rates)
    print(
        f"{depth} x {dim}, {side}x{side} tokens of {vocab_size}, batch {batch}, guidance "
        f"{guidance:g}; {device_name(device)}, {dtype}, {threads} thread(s): "
        f"{best.reading / 1e9:.1f} GB/s read, {best.multiplying / 1e9:.0f} GFLOP/s\n"
    )
    seconds = {key: median for key, (median,) in zip(loops, medians, strict=True)}
    print_table(needs, seconds, best, batch)
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


def print_table(
    needs: dict[Order, tuple[int, Work]],
    seconds: dict[tuple[Order, str], float],
    rates: Rates,
    batch: int,
) -> None:
    kinds = dict.fromkeys(kind for _, kind in seconds)
    columns = ["order", "passes", "floor, ms per image", "set by"]
    for kind in kinds:
        columns += [f"{kind}: ms per image", "images/s", "ms per pass", "times the floor"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for order, (passes, work) in needs.items():
        floor = work.floor(rates)
        cells = [order, passes, f"{1000 * floor / batch:.2f}", work.bound(rates)]
        for kind in kinds:
            took = seconds[order, kind]
            found = 1000 * took / batch, batch / took, 1000 * took / passes, took / floor
            cells += [f"{value:.{2 if value >= 1 else 3}f}" for value in found]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    run(main)
