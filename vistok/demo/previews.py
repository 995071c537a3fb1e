"""Images as they are decoded: what is known after a pass, and a picture of it (as MaskGIT, Chang et
al., 2022, arXiv:2202.04200, shows its passes).

Where first tokens decode by themselves, those that are known do. Elsewhere tokens that are not yet
known stand as those of a blank picture, and their places on a grid are left blank.
"""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

from vistok.decoding import Decoding, Given, MaskedPlan, Noise, RandomPlan
from vistok.generators import Condition, Generator
from vistok.layers.pyramid import upscaled
from vistok.pipelines import ImagePipeline

BLANK = 0.93  # brightness of what is not known
MOST = 16  # previews of a run


@dataclass(frozen=True)
class Preview:
    """Images after some of the passes, of which there are `at_most` so many where that depends on
    what is drawn, and some of the tokens."""

    images: Float[Tensor, "b 3 h w"]
    passes: int
    of_passes: int
    tokens: int
    of_tokens: int
    at_most: bool = False

    def __str__(self) -> str:
        most = "at most " if self.at_most else ""
        passes = f"pass {self.passes} of {most}{self.of_passes}"
        return f"{passes}, {self.tokens} of {self.of_tokens} tokens"


class Stopped(Exception):
    """Nobody asks for more of a run."""


def stream(
    pipeline: ImagePipeline,
    condition: Condition,
    seed: int,
    decoding: Decoding | None = None,
    given: Given | None = None,
    most: int = MOST,
) -> Iterator[Preview]:
    """Yield at most `most` previews of images 0, 1, ... of the run `seed`; the last holds what
    `pipeline.sample` returns, and what that raises is raised. A run is given up at the pass after
    this iterator is closed."""
    indices = range(len(condition))
    run = Unfinished(pipeline, condition, seed, decoding or pipeline.decoding)
    due = {ceil(run.passes * i / most) - 1 for i in range(1, most)} - {run.passes - 1}
    previews, closed, passes = queue.SimpleQueue(), threading.Event(), 0

    def on_pass(t: int, decoded: Tensor) -> None:
        nonlocal passes
        passes = t + 1
        if closed.is_set():
            raise Stopped
        if t in due:
            previews.put(run.preview(t, decoded))

    with ThreadPoolExecutor(1) as worker:
        result = worker.submit(pipeline.sample, condition, seed, indices, decoding, on_pass, given)
        result.add_done_callback(lambda _: previews.put(None))
        try:
            yield from iter(previews.get, None)
            yield Preview(result.result(), passes, passes, run.positions, run.positions)
        finally:
            closed.set()


class Unfinished:
    """What is known, and can be seen, of images that are being decoded, for a condition, a seed and
    settings as `ImagePipeline.sample` takes them."""

    def __init__(
        self, pipeline: ImagePipeline, condition: Condition, seed: int, decoding: Decoding
    ):
        self.generator, self.tokenizer = pipeline.generator, pipeline.tokenizer
        self.plan = decoding.plan_of(self.generator)
        self.is_adaptive = bool(decoding.plan and decoding.plan.adaptive_window)
        self.text = pipeline.text_of(condition)
        self.batch, self.seed = len(condition), seed

    @property
    def passes(self) -> int:
        """How many there are; at most, of all images together, where the plan is adaptive."""
        return len(self.plan) * (self.batch if self.is_adaptive else 1)

    @property
    def positions(self) -> int:
        """How many are decoded of an image, or where the plan is adaptive of all together."""
        masked = isinstance(self.plan, MaskedPlan)
        one = self.plan.masked[0] if masked else len(self.plan.rank_of_position)
        return one * (self.batch if self.is_adaptive else 1)

    def preview(self, t: int, decoded: Tensor) -> Preview:
        """Return what can be seen of what a loop shows after pass t."""
        known = self.known(t, decoded)
        count = int((known if self.is_adaptive else known[0]).sum())
        images = self.images(decoded, known)
        sizes = self.passes, count, self.positions
        return Preview(images, t + 1, *sizes, at_most=self.is_adaptive)

    def known(self, t: int, decoded: Tensor) -> Bool[Tensor, "b n"]:
        """Return which positions are decoded after pass t."""
        if isinstance(self.plan, RandomPlan):
            return decoded.ne(0).any(-1)
        if isinstance(self.plan, MaskedPlan):
            return decoded != self.generator.mask_token
        if self.is_adaptive:
            return decoded >= 0
        sets = sum(not fed.correction for fed in self.plan.passes[: t + 1])
        known = self.plan.rank_of_position < sets
        return known.to(decoded.device).expand(len(decoded), -1)

    def images(self, decoded: Tensor, known: Bool[Tensor, "b n"]) -> Float[Tensor, "b 3 h w"]:
        """Return what the known positions show."""
        spec = self.tokenizer.spec
        if self.generator.decoded.is_scales and not spec.is_scales:
            return self._decoded(last_scale(self.generator, decoded, known))
        shape = self.generator.decoded.first(decoded.shape[1]).tensor_shape
        tokens = self.generator.finish(decoded.view(-1, *shape))
        known = of_tokens(self.generator, known)
        count = int(known.sum(1).max())
        if spec.has_prefixes and known[:, :count].all():
            prefixes = [length for length in spec.lengths if length <= count]
            return self._decoded(tokens[:, : prefixes[-1]]) if prefixes else self._blank()
        values = len(spec.value_shape)
        where = known.view(*tokens.shape[: tokens.ndim - values], *[1] * values)
        blank = self.tokenizer.encode(self._blank())[:, : tokens.shape[1]]
        images = self._decoded(torch.where(where, tokens, blank.to(tokens)))
        if spec.is_scales or len(spec.shape) != 2:
            return images
        grid = known.view(-1, 1, *spec.shape).float()
        return torch.where(interpolate(grid, images.shape[-2:]) > 0, images, BLANK)

    def _blank(self) -> Float[Tensor, "b 3 h w"]:
        shape = self.batch, *self.tokenizer.input_shape
        return torch.full(shape, BLANK, device=self.tokenizer.device)

    def _decoded(self, tokens: Tensor) -> Float[Tensor, "b 3 h w"]:
        noise = Noise(self.seed, range(self.batch))
        return self.tokenizer.decode(tokens, text=self.text, noise=noise)


def last_scale(
    generator: Generator, decoded: Float[Tensor, "b n c"], known: Bool[Tensor, "b n"]
) -> Float[Tensor, "b h w c"]:
    """Return the finest of several scales that is known, blown up to the grid."""
    ends = accumulate((h * w for h, w in generator.decoded.shape), initial=0)
    count, side = int(known[0].sum()), generator.spec.shape[0]
    begin, end = max(scale for scale in pairwise(ends) if scale[1] <= count)
    return upscaled(decoded[:, begin:end], side, side).unflatten(1, (side, side))


def of_tokens(generator: Generator, known: Bool[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """Return which tokens are known where positions, of which those are, may be squares of them."""
    if generator.decoded.shape == generator.spec.shape:
        return known
    squares = known.view(-1, 1, *generator.decoded.shape).float()
    return interpolate(squares, generator.spec.shape).flatten(1) > 0
