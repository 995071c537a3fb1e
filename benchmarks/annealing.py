"""Time annealed steps (DiSA: Zhao et al., 2025, arXiv:2505.20297) beside constant ones.

python benchmarks/annealing.py

Models have random weights, for time does not depend on them. Each line gives what annealed steps
take of as many constant ones as they begin with: how often the network that takes the steps is
called, for how many tokens in all, those of the null half of guidance included, the CPU time in its
calls, and that of whole batches, which in MAR holds the transformer's passes, too.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.decoding import (
    Decoding,
    Noise,
    Order,
    Sampler,
    Schedule,
    decode,
    decode_random,
)
from vistok.generators import MAR, XAR, Generator
from vistok.heads import DiffusionHead
from vistok.options import run
from vistok.tokens import TokenSpec

LATEST = Sampler("ddpm(950)")  # of MAR
GUIDANCE = Schedule("linear(1,2.9)")
CHANNELS, CLASSES = 16, list(map(str, range(1000)))


@dataclass(frozen=True)
class Sizes:
    """Width, blocks in each half and heads of the transformer, positions a side, and images."""

    width: int = 256
    depth: int = 4
    num_heads: int = 8
    side: int = 16
    batches: tuple[int, ...] = (1, 4)


@dataclass(frozen=True)
class Head:
    """That of MAR."""

    width: int
    depth: int


def main(
    sizes: Sizes = Sizes(),
    heads: list[Head] | None = None,
    passes: int = 64,
    mar: Schedule = Schedule("linear(50,5)"),
    cell: int = 8,
    xar: Schedule = Schedule("linear(50,15)"),
    repeats: int = 5,
    threads: int = 1,
) -> None:
    """Print the shares of calls, tokens and times.

    Args:
        sizes: of the transformers
        heads: of MAR, each a model; by default a small one and that of MAR-B
        passes: of MAR
        mar: its annealed steps
        cell: positions a side of the cells of xAR
        xar: its annealed steps
        repeats: timed runs of annealed and constant steps, in turn, of which the median counts
        threads: of the CPU; the time of several is their sum
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    spec, widths = TokenSpec.latents((sizes.side,) * 2, CHANNELS), (sizes.width, sizes.depth)
    decoding = Decoding(Order(f"mar({passes})"), GUIDANCE, steps=mar, sampler=LATEST)
    cases = []
    for head in heads or (Head(256, 3), Head(1024, 6)):
        inner = DiffusionHead(head.width, head.depth)
        model = MAR(spec, CLASSES, inner, *widths, sizes.num_heads)
        cases.append((f"MAR, head {head.depth} x {head.width}", model, decoding))
    model = XAR(spec, CLASSES, f"cells({cell})", *widths, sizes.num_heads)
    cases.append(("xAR", model, Decoding(guidance=GUIDANCE, steps=xar)))
    print(
        f"{sizes.depth}+{sizes.depth} x {sizes.width}, {spec}; "
        f"CPU ({torch.backends.cpu.get_cpu_capability()}), float32, {threads} thread(s): medians "
        f"of {repeats}\n\n"
        "| model | batch | steps | calls | tokens | time in the calls | time | ms |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for name, model, decoding in cases:
        for batch in sizes.batches:
            *shares, seconds = annealing(model.eval(), decoding, batch, repeats)
            numbers = " | ".join(f"{share:.3f}" for share in shares)
            ms = f"{1000 * seconds:.0f}"
            print(f"| {name} | {batch} | {decoding.steps} | {numbers} | {ms} |", flush=True)


def annealing(
    model: Generator, decoding: Decoding, batch: int, repeats: int
) -> tuple[float, float, float, float, float]:
    """Return the shares in calls, tokens, time in the calls and time, and the seconds of a batch
    with annealed steps."""
    both = decoding, decoding.changed(steps=Schedule(decoding.steps(0.0)))
    counts = [evaluations(model, each) for each in both]
    place = (model.head, "sample") if isinstance(model, MAR) else (model, "draw")
    loop = decode_random if isinstance(model, MAR) else decode
    watch, labels, rounds = Stopwatch(getattr(*place)), torch.arange(batch), []
    setattr(*place, watch)
    for _ in range(1 + repeats):
        rounds.append([])
        for each in both:
            began, watch.seconds = time.process_time(), 0.0
            loop(model, labels, Noise(0, labels), each)
            rounds[-1] += [watch.seconds, time.process_time() - began]
    columns = zip(*rounds[1:], strict=True)  # the first round warmed up
    calls, all_time, constant_calls, all_constant = map(statistics.median, columns)
    setattr(*place, watch.function)
    shares = [a / b for a, b in zip(*counts, strict=True)]
    return *shares, calls / constant_calls, all_time / all_constant, all_time


def evaluations(model: Generator, decoding: Decoding) -> tuple[int, int]:
    """Return how often the network that takes the steps is called, and for how many tokens of an
    image in all calls, of which those under guidance count twice."""
    plan = decoding.plan_of(model)
    calls = decoding.calls(plan, model.head)
    halves = [1 if scale == 1 else 2 for scale in decoding.scales(plan)]
    return sum(calls), sum(map(math.prod, zip(calls, plan.sizes, halves, strict=True)))


class Stopwatch:
    """A function and the seconds spent in it."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: object) -> Tensor:
        began = time.process_time()
        result = self.function(*args)
        self.seconds += time.process_time() - began
        return result


if __name__ == "__main__":
    run(main)
