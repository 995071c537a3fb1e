"""How fast a pipeline decodes: passes, calls of the network, images a second, and how far that is
from the floor of the device (`vistok.roofline`)."""

import copy
import operator
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vistok.decoding import Decoding, Noise, Plan, RandomPlan, decode_adaptively
from vistok.errors import UserError
from vistok.generators import Condition, Generator
from vistok.pipelines import ImagePipeline
from vistok.roofline import Rates, Work, count_work, measured_rates, timed
from vistok.text import caption_shape
from vistok.tokenizers import Tokenizer


@dataclass(frozen=True)
class Case:
    """What is timed: batches of images of a pipeline, decoded by `decoding` or, where that is None,
    as the pipeline itself does."""

    name: str
    pipeline: ImagePipeline
    batch: int = 1
    decoding: Decoding | None = None

    @property
    def settings(self) -> Decoding:
        return self.decoding or self.pipeline.decoding


@dataclass(frozen=True)
class Cost:
    """What one image takes: `passes` of the generator; `calls` of the network that draws tokens,
    one after another, which are more where a head takes steps or digits; and `rows`, the tokens
    that these calls see in all. With an adaptive window all three are means."""

    passes: float
    calls: float
    rows: float


@dataclass(frozen=True)
class Speed:
    """The speed of a case: `work` and `seconds` of the tokens of one batch, `decoder_seconds` of
    making images of them, and the `rates` of the device."""

    case: Case
    cost: Cost
    work: Work
    seconds: float
    decoder_seconds: float
    rates: Rates

    @property
    def parameters(self) -> int:
        """Of the generator."""
        return self.case.pipeline.generator.num_parameters()

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.case.settings.length or self.case.pipeline.generator.spec.num_tokens

    @property
    def images_per_second(self) -> float:
        """Of the tokens alone."""
        return self.case.batch / self.seconds

    @property
    def images_per_second_decoded(self) -> float:
        """With the tokenizer's decoder."""
        return self.case.batch / (self.seconds + self.decoder_seconds)

    @property
    def times_the_floor(self) -> float:
        return self.seconds / self.work.floor(self.rates)

    def row(self) -> dict[str, str | float]:
        """Return the figures by name, as a row of a table."""
        milliseconds = 1000 / self.case.batch
        together = 1 if adaptive_window(self.case.settings) else self.case.batch
        return {
            "plan": self.case.name,
            "batch": self.case.batch,
            "passes": self.cost.passes,
            "network calls": self.cost.calls,
            "tokens x calls": self.cost.rows,
            "ms per pass": milliseconds * together * self.seconds / self.cost.passes,
            "ms per image": milliseconds * self.seconds,
            "images/s": self.images_per_second,
            "floor, ms per image": milliseconds * self.work.floor(self.rates),
            "set by": self.work.bound(self.rates),
            "times the floor": self.times_the_floor,
            "decoder, ms per image": milliseconds * self.decoder_seconds,
            "images/s with decoder": self.images_per_second_decoded,
        }


@dataclass(frozen=True)
class TokenizerSpeed:
    """The seconds in which a tokenizer encodes a batch of images, and decodes their tokens."""

    batch: int
    encoder_seconds: float
    decoder_seconds: float

    def row(self) -> dict[str, float]:
        """Return the figures by name, as a row of a table."""
        row = {"batch": self.batch}
        for part in ("encoder", "decoder"):
            seconds = getattr(self, f"{part}_seconds")
            row[f"{part}, ms per image"] = 1000 * seconds / self.batch
            row[f"{part}, images/s"] = self.batch / seconds
        return row


def measure(cases: Sequence[Case], repeats: int = 5) -> list[Speed]:
    """Time cases in turn, `repeats` times after a round that is not counted, and return medians.

    Images are of the classes in turn or, of a text-conditional generator, of random captions of
    full length. Times end when the device is done; its rates are measured in each round, of which
    the best count. Raises `UserError` for less than one image or repeat, and for a plan that does
    not fit.
    """
    check_counts(repeats, [case.batch for case in cases])
    runs = [_Run(case) for case in cases]
    counted = [run.count() for run in runs]
    devices, rates = [(case.pipeline.device, case.pipeline.generator.dtype) for case in cases], {}

    def measure_rates() -> None:
        for device in set(devices):
            found = measured_rates(*device)
            rates[device] = found.best(rates.get(device, found))

    seconds = in_turn([run.seconds for run in runs], repeats, measure_rates)
    return [
        Speed(case, *needs, *times, rates[device])
        for case, needs, times, device in zip(cases, counted, seconds, devices, strict=True)
    ]


def measure_tokenizer(
    tokenizer: Tokenizer, batches: Sequence[int], repeats: int = 5
) -> list[TokenizerSpeed]:
    """The same for a tokenizer alone, on random images in batches of these sizes."""
    check_counts(repeats, batches)

    def both(batch: int) -> Callable[[], tuple[float, float]]:
        images = torch.rand(batch, *tokenizer.input_shape).to(tokenizer.device, tokenizer.dtype)

        @torch.inference_mode()
        def run() -> tuple[float, float]:
            encoding, tokens = timed(lambda: tokenizer.encode(images), tokenizer.device)
            return encoding, timed(lambda: decoded(tokenizer, tokens), tokenizer.device)[0]

        return run

    seconds = in_turn([both(batch) for batch in batches], repeats)
    return [TokenizerSpeed(b, *times) for b, times in zip(batches, seconds, strict=True)]


def in_turn(
    runs: Sequence[Callable[[], tuple[float, ...]]],
    repeats: int,
    between: Callable[[], None] = lambda: None,
) -> list[tuple[float, ...]]:
    """Return the medians of what each of `runs` measures, from `repeats` rounds over all of them
    after one that is not counted, so that what slows the machine for a while slows all alike."""
    rounds = []
    for _ in range(repeats + 1):
        between()
        rounds.append([run() for run in runs])
    by_run = zip(*rounds[1:], strict=True)
    return [tuple(map(statistics.median, zip(*found, strict=True))) for found in by_run]


class _Run:
    """One case. A pipeline keeps the state of one batch size and plan: here each has its own."""

    def __init__(self, case: Case):
        self.pipeline, self.settings = copy.copy(case.pipeline), case.settings
        self.cost = cost(self.pipeline.generator, self.settings)
        self.condition, self.numbers = conditions(self.pipeline.generator, case.batch), case.batch

    def tokens(self) -> Tensor:
        images = range(self.numbers)
        return self.pipeline.sample_tokens(self.condition, 0, images, self.settings)

    def count(self) -> tuple[Cost, Work]:
        generator, window = self.pipeline.generator, adaptive_window(self.settings)
        if not window:
            return self.cost, count_work(self.tokens, generator)[0]
        condition, noise = self.condition.to(generator.device), Noise(0, range(self.numbers))
        work, (_, passes) = count_work(
            lambda: decode_adaptively(generator, condition, noise, window, self.settings), generator
        )
        mean = statistics.mean(passes)
        return replace(self.cost, passes=mean, calls=mean), work

    @torch.inference_mode()
    def seconds(self) -> tuple[float, float]:
        device, tokenizer = self.pipeline.device, self.pipeline.tokenizer
        drawing, tokens = timed(self.tokens, device)
        return drawing, timed(lambda: decoded(tokenizer, tokens), device)[0]


def cost(generator: Generator, decoding: Decoding) -> Cost:
    """Return what an image takes of a generator; raise `UserError` for a plan that does not fit.
    With an adaptive window it is what it takes at most."""
    plan = decoding.plan_of(generator)
    calls = decoding.calls(plan, generator.head)
    # Masked decoding draws all tokens in each pass, whichever of them stay.
    known = isinstance(plan, Plan | RandomPlan)
    sizes = plan.sizes if known else [generator.spec.num_tokens] * len(plan)
    return Cost(len(plan), sum(calls), sum(map(operator.mul, calls, sizes)))


def conditions(generator: Generator, batch: int) -> Condition:
    """Return what images are made of where any will do: the classes in turn, or random captions."""
    shape = caption_shape(generator)
    if shape is None:
        return torch.arange(batch) % len(generator.class_names)
    length, channels = shape
    ids = torch.zeros(batch, length, dtype=torch.int64)
    values = ids if channels is None else torch.randn(batch, length, channels)
    return generator.condition.of(values, torch.ones(batch, length, dtype=torch.bool))


def decoded(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """Return the images of tokens, with random captions where the tokenizer decodes with such."""
    text = None
    if tokenizer.text_shape is not None:
        text = torch.randn(len(tokens), *tokenizer.text_shape).to(tokens.device, tokenizer.dtype)
    return tokenizer.decode(tokens, text=text, noise=Noise(0, range(len(tokens))))


def adaptive_window(decoding: Decoding) -> int | None:
    """Return the window of a plan that is found on the way, image by image; None for others."""
    return decoding.plan.adaptive_window if decoding.plan else None


def check_counts(repeats: int, batches: Sequence[int]) -> None:
    """Raise `UserError` unless there is something to measure."""
    if repeats < 1:
        raise UserError(f"repeats {repeats} must be at least 1")
    if not batches or min(batches) < 1:
        raise UserError(f"batch sizes {', '.join(map(str, batches))}: each must be at least 1")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} processors)"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows of the same columns as a table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(_figure, r.values()) for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(value: object) -> str:
    if not isinstance(value, float) or value.is_integer():
        return f"{value:.0f}" if isinstance(value, float) else str(value)
    return f"{value:.{2 if value >= 1 else 3}f}"
