"""Time the decode loop with its key-value cache against one forward pass over everything per token.

python benchmarks/decode.py --dim 256 --depth 4 --num_heads 8

Both decode the same tokens from the same noise; they run in turn in one process, and the ratio of
each pair is quoted, so that a machine whose speed drifts does not favour either.
"""

import statistics
import time

import torch

from vistok.cli import run
from vistok.decoding import Decoding, Noise, Sampling, Schedule, decode, sample_categorical
from vistok.generators import LlamaGen
from vistok.tokens import TokenSpec


@torch.inference_mode()
def main(
    dim: int = 256,
    depth: int = 4,
    num_heads: int = 8,
    side: int = 16,
    vocab_size: int = 16384,
    batch: int = 4,
    guidance: float = 2.0,
    pairs: int = 3,
    threads: int = 1,
) -> None:
    """Print passes, ms per image and images/s of both loops.

    Args:
        dim: width of the transformer
        depth: its blocks
        num_heads: its heads
        side: of the grid of tokens
        vocab_size: number of codes
        batch: images at once
        guidance: scale; 1 is off
        pairs: timed pairs of runs, after one that is not counted
        threads: of the CPU
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaGen(
        TokenSpec.ids((side, side), vocab_size), [str(i) for i in range(10)], dim, depth, num_heads
    )
    torch.nn.init.normal_(model.head.linear.weight, std=0.02)
    model = model.to(device).eval()
    labels = (torch.arange(batch) % 10).to(device)

    def cached():
        return decode(
            model, labels, Noise(0, range(batch)), Decoding(guidance=Schedule(guidance))
        ).flatten(1)

    def uncached():
        return decode_without_cache(model, labels, guidance)

    if not torch.equal(cached(), uncached()):
        raise SystemExit("the two loops disagree")
    seconds = [(timed(cached, device), timed(uncached, device)) for _ in range(pairs)]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} CPU thread(s)"
    print(f"{depth} x {dim}, {side}x{side} tokens, batch {batch}, guidance {guidance:g}, {where}")
    print("| loop | passes | ms per image | images/s |\n|---|---|---|---|")
    for name, times in zip(("cache", "no cache"), zip(*seconds, strict=True), strict=True):
        median = statistics.median(times) / batch
        print(f"| {name} | {side * side} | {1000 * median:.1f} | {1 / median:.2f} |")
    ratios = sorted(slow / fast for fast, slow in seconds)
    print(f"ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")


def timed(function, device: torch.device) -> float:
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def decode_without_cache(model: LlamaGen, labels: torch.Tensor, guidance: float) -> torch.Tensor:
    """The reference: rows 0 to t through the whole network for token t."""
    n = model.spec.num_tokens
    rows = model.plan().to(labels.device).training
    positions = model.positions(rows)
    halves = torch.cat([labels, model.null_condition(labels)]) if guidance != 1 else labels
    uniform = Noise(0, range(len(labels))).uniform(n).to(labels.device)
    tokens = torch.zeros(len(labels), n, dtype=torch.long, device=labels.device)
    for t in range(n):
        fed = tokens.repeat(len(halves) // len(labels), 1)
        x = model.embed(fed, halves, rows)[:, : t + 1]
        last = model.norm(model.transformer(x, positions[: t + 1], is_causal=True)[:, -1])
        if guidance != 1:
            last = torch.lerp(last[len(labels) :], last[: len(labels)], guidance)
        tokens[:, t] = sample_categorical(model.head.logits(last), uniform[:, t], Sampling())
    return tokens


if __name__ == "__main__":
    run(main)
