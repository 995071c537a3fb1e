"""ZipAR with its adaptive window (He et al., 2024, arXiv:2412.04062): rows that start when ready.

A row begins with a candidate as soon as the row above has `window` tokens. Each pass after that
knows one token more and tests the candidate by the rule of speculative sampling (Leviathan et al.,
2022, arXiv:2211.17192); the row goes on once a test accepts it, or the row above is complete. The
released code has fixed windows only, which are plans (`vistok.Order("zipar(16)")`); here the passes
depend on what was drawn, so that images are decoded one by one and the host waits at each pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import one_hot

from vistok.decoding.loop import Decoding, Steppable
from vistok.decoding.noise import Noise
from vistok.decoding.orders import Order, in_slots
from vistok.decoding.plans import Pass, Plan
from vistok.decoding.sampling import Sampling, inverse_cdf, probabilities


@dataclass
class Start:
    """A row's candidate for its first token, and the distribution that it is a draw of."""

    token: Int64[Tensor, ""]
    distribution: Float[Tensor, "v"]
    tests: int = 0


@torch.inference_mode()
def decode_adaptively(
    generator: Steppable,
    condition: object,
    noise: Noise,
    window: int,
    decoding: Decoding,
    on_pass: Callable[[int, Tensor], None] | None = None,
) -> tuple[Int64[Tensor, "b h w"], list[int]]:
    """Decode a batch, (B, h, w), by a model of raster order; also return each image's passes, at
    least 2w + (h - 2)(window + 1). `decoding.plan` is not read. `on_pass(t, tokens)` sees the
    tokens (B, N) after each pass, of whichever image, -1 where there are none yet."""
    height, width = generator.spec.shape
    draws = noise.uniform(height * width).to(condition.device)
    tests = noise.uniform(height, width, 2).to(condition.device)
    guided = any(scale != 1 for scale in decoding.scales(generator.plan()))
    state = generator.new_state(1 + guided, generator.plan(Order("zipar(1)")))
    decoded = torch.full((len(condition), height * width), -1, device=condition.device)
    counts = []
    for i in range(len(condition)):
        one = condition[i : i + 1]
        one = generator.with_null(one) if guided else one
        passes = _decode_one(generator, one, draws[i], tests[i], window, decoding, state)
        for t, tokens in enumerate(passes):
            decoded[i] = tokens
            if on_pass is not None:
                on_pass(sum(counts) + t, decoded)
        counts.append(t + 1)
    return decoded.view(len(condition), height, width), counts


def _decode_one(
    generator: Steppable,
    condition: object,
    draws: Float[Tensor, "n"],
    tests: Float[Tensor, "h w 2"],
    window: int,
    decoding: Decoding,
    state: object,
) -> Iterator[Int64[Tensor, "n"]]:
    """Yield the tokens after each pass."""
    height, width = generator.spec.shape
    state.reset()
    tokens = torch.full((len(condition), height * width), -1, device=draws.device)

    def distributions(fed: Pass) -> Float[Tensor, "s v"]:
        fraction = sum(produced) / (height * width)
        hidden = generator.step(tokens, condition, fed.to(draws.device), state)
        null = hidden[1:] if len(hidden) > 1 else None
        logits = generator.head.guided_logits(hidden[:1], null, decoding.guidance(fraction))
        return sharpened(logits[0], decoding.sampling(fraction))

    produced = [0] * height
    for fed in generator.plan().passes[:width]:
        (first,) = distributions(fed)
        tokens[:, produced[0]] = inverse_cdf(first, draws[produced[0]])
        produced[0] += 1
        yield tokens[0]

    starts: dict[int, Start] = {}
    flushed: set[int] = set()  # rows whose true last token has been fed
    while produced[-1] < width:
        fed, rows = _next_pass(produced, flushed, window, generator.plan())
        complete = [count == width for count in produced]
        for row, now in zip(rows, distributions(fed), strict=True):
            cell = row * width + produced[row]
            is_last_chance = produced[row] > 0 or complete[row - 1]
            if row in starts and produced[row] == 0:
                start, (accepts, draw) = starts[row], tests[row, starts[row].tests]
                token, accepted = retest(start.token, start.distribution, now, accepts, draw)
                starts[row] = Start(token, now, start.tests + 1)
            else:
                token, accepted = inverse_cdf(now, draws[cell]), False
                starts.setdefault(row, Start(token, now))
            if accepted or is_last_chance:
                tokens[:, cell] = token
                produced[row] += 1
        yield tokens[0]


def sharpened(logits: Float[Tensor, "s v"], sampling: Sampling) -> Float[Tensor, "s v"]:
    """Return the distributions that tokens are drawn from; at temperature 0 all on one token."""
    if sampling.temperature == 0:
        return one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    return probabilities(logits, sampling)


def retest(
    candidate: Int64[Tensor, ""],
    before: Float[Tensor, "v"],
    now: Float[Tensor, "v"],
    accepts: Float[Tensor, ""],
    draw: Float[Tensor, ""],
) -> tuple[Int64[Tensor, ""], bool]:
    """Turn a draw of `before` into a draw of `now`: keep it with probability now / before, else
    draw from what `now` has in excess. Return it and whether it was kept. Takes two uniforms."""
    excess = (now - before).clamp(min=0)
    # Distributions that differ by rounding alone may leave no excess to draw from.
    if accepts * before[candidate] < now[candidate] or not excess.any():
        return candidate, True
    return inverse_cdf(excess / excess.sum(), draw), False


def _next_pass(
    produced: list[int], flushed: set[int], window: int, raster: Plan
) -> tuple[Pass, list[int]]:
    """Return what is fed next, and the rows that it predicts a token of."""
    height, width = raster.shape
    condition_rows = len(raster.passes[0].condition)
    tokens, cells, rows, source = [], [], [], []
    for row in range(1, height):
        column, above = produced[row], produced[row - 1]
        end_above = row * width - 1
        if column > 0 and above == width and row - 1 not in flushed:
            tokens.append(end_above)
            cells.append(end_above)
            flushed.add(row - 1)
        if column == width or (column == 0 and above < min(window, width)):
            continue
        stands_in = column == 0 and above < width
        tokens.append(
            (row - 2) * width + produced[row - 2] - 1 if stands_in else end_above + column
        )
        cells.append(end_above + column)
        source.append(len(cells) - 1)
        rows.append(row)
        if column == 0 and not stands_in:
            flushed.add(row - 1)
    predict = [row * width + produced[row] for row in rows]
    return in_slots(condition_rows, 0, tokens, cells, predict, source), rows
