"""Time the decode loop in several orders, beside the floor that the device sets ("Roofline",
Williams et al., 2009): each pass reads the weights and the live cache from memory, and every row
fed is multiplied by the weights.

python benchmarks/decode.py --dim 768 --depth 12 --num_heads 12 --batch 1

The other sizes of LlamaGen: L 1024, 24, 16; XL 1280, 36, 20; XXL 1536, 48, 24; 3B 3200, 24, 32.
"""

import copy
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.cli import run
from vistok.decoding import Decoding, Noise, Order, Plan, Schedule, decode
from vistok.generators import NAR, LlamaGen
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
    number = getattr(torch, dtype)
    labels = (torch.arange(batch) % 10).to(device)
    sequences = batch * (2 if guidance != 1 else 1)
    loops, work = {}, {}
    for order in orders:
        model = build(order, TokenSpec.ids((side, side), vocab_size), dim, depth, num_heads)
        model, plan = model.to(device, number).eval(), model.plan(order)
        needed = bytes_read(model, plan, sequences), flops(model, plan, batch, sequences)
        work[order] = (*needed, len(plan))
        state = model.new_state(sequences, plan)
        decoding = Decoding(order, guidance=Schedule(guidance))
        loops[order, "eager"] = decoder(model, labels, decoding, state)
        if compile:
            loops[order, "compiled"] = decoder(compiled(model), labels, decoding, state)

    tokens = {key: loop() for key, loop in loops.items()}  # and all is warm
    seconds, rates = {key: [] for key in loops}, []
    for _ in range(repeats):
        rates.append((read_rate(device), product_rate(device, number)))
        for key, loop in loops.items():
            seconds[key].append(timed(loop, device))
    reading, multiplying = (max(measured) for measured in zip(*rates, strict=True))

    print(
        f"{depth} x {dim}, {side}x{side} tokens of {vocab_size}, batch {batch}, guidance "
        f"{guidance:g}, {dtype}; {name_of(device)}, {threads} thread(s), measured to read "
        f"{reading / 1e9:.1f} GB/s and to multiply at {multiplying / 1e9:.0f} GFLOP/s\n"
    )
    kinds = ("eager", "compiled") if compile else ("eager",)
    head = ["order", "passes", "floor: ms per image", "set by"]
    for kind in kinds:
        head += [f"{kind}: ms per image", "images/s", "ms per pass", "times the floor"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for order, (read, multiplied, passes) in work.items():
        floor = max(read / reading, multiplied / multiplying)
        set_by = "reads" if floor == read / reading else "products"
        cells = [str(order), str(passes), f"{1000 * floor / batch:.2f}", set_by]
        for kind in kinds:
            took = statistics.median(seconds[order, kind])
            measured = (1000 * took / batch, batch / took, 1000 * took / passes, took / floor)
            cells += [f"{value:.2f}" for value in measured]
        print(f"| {' | '.join(cells)} |")
    for order in orders if compile else ():
        wrong = (tokens[order, "eager"] != tokens[order, "compiled"]).sum().item()
        if wrong:
            print(f"\n{order}: {wrong} of {batch * side**2} tokens of the compiled loop differ")


def build(order: Order, spec: TokenSpec, dim: int, depth: int, num_heads: int) -> LlamaGen:
    """A model that decodes by `order`, with random weights."""
    sizes = {"dim": dim, "depth": depth, "num_heads": num_heads}
    classes = [str(label) for label in range(10)]
    if order.name == "nar":
        model = NAR(spec, classes, **sizes)
    else:
        model = LlamaGen(spec, classes, "raster" if order.name == "zipar" else str(order), **sizes)
    nn.init.normal_(model.head.linear.weight, std=0.02)
    return model


def compiled(model: LlamaGen) -> LlamaGen:
    """A compiled twin with the same weights."""
    # All models run one piece of code, whose versions are counted together; beyond the limit it
    # would silently stay eager.
    torch._dynamo.config.recompile_limit = 64
    twin = copy.copy(model)
    twin.compile_decoding()
    return twin


def decoder(model: LlamaGen, labels: Tensor, decoding: Decoding, state) -> Callable[[], Tensor]:
    """The loop over one batch; runs share their state, as a pipeline's do."""
    return lambda: decode(model, labels, Noise(0, range(len(labels))), decoding, state)


def bytes_read(model: LlamaGen, plan: Plan, sequences: int) -> int:
    """Bytes of weights and of cached keys and values that the passes of one batch read."""
    attention = model.blocks[0].attention
    kept = 2 * len(model.blocks) * attention.num_kv_heads * attention.head_dim  # for each row
    weights = matrices(model.blocks) + matrices(model.head)
    return (len(plan) * weights + sequences * sum(visible(plan)) * kept) * model.dtype.itemsize


def flops(model: LlamaGen, plan: Plan, batch: int, sequences: int) -> int:
    """FLOPs of one batch: all rows fed through the blocks, each image's predicted positions through
    the head, and every row's attention to what it may see."""
    attention = model.blocks[0].attention
    pairs = sum(fed.rows * end for fed, end in zip(plan.passes, visible(plan), strict=True))
    blocks = matrices(model.blocks) * plan.rows
    attended = 2 * len(model.blocks) * attention.num_heads * attention.head_dim * pairs
    head = matrices(model.head) * sum(len(fed.predict) for fed in plan.passes)
    return 2 * (sequences * (blocks + attended) + batch * head)


def visible(plan: Plan) -> list[int]:
    """Rows of the cache that each pass reads, its own included."""
    filled = accumulate(fed.rows for fed in plan.passes)
    return [
        end if fed.sees is None else fed.sees.shape[1]
        for fed, end in zip(plan.passes, filled, strict=True)
    ]


def matrices(module: nn.Module) -> int:
    """Elements of the weights that rows are multiplied by; norms are vectors and not counted."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def read_rate(device: torch.device) -> float:
    """Bytes read a second, from a memory beyond all caches, by the faster of two reductions."""
    memory = torch.ones(2 ** (28 if device.type == "cuda" else 26), device=device)
    rows, vector = memory.view(-1, 4096), memory[:4096]
    return (
        4
        * memory.numel()
        / min(fastest(memory.sum, device), fastest(lambda: rows @ vector, device))
    )


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    square = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / fastest(lambda: square @ square, device)


def fastest(function: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    return min(timed(function, device) for _ in range(tries))


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds; the device was idle before."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    features = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU with {features}, {os.cpu_count()} processors"


if __name__ == "__main__":
    run(main)
