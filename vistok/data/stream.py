"""The order of training data as a pure function of integers.

Position p of a `Stream` is one fixed sample with one fixed augmentation, whatever was read before.
Optimiser step k takes the positions [k G, (k + 1) G) of global batch G, cut into consecutive slices
over micro-batches and processes. A resumed run therefore stores the step alone, and another number
of processes sees the same samples per step.
"""

import atexit
import hashlib
import logging
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vistok.data.sources import BrokenSampleError, ImageSource
from vistok.data.transforms import Transform
from vistok.errors import UserError

logger = logging.getLogger(__name__)

MAX_SKIPPED = 32  # broken samples in a row before training stops

Item = dict[str, Any]


def keyed_generator(seed: int, purpose: str, counter: int) -> torch.Generator:
    """Return a generator that depends on these three alone."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{counter}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@runtime_checkable
class TrainingData(Protocol):
    """What a `Stream` draws from: `Images` or a `TokenCache`."""

    def __len__(self) -> int: ...

    def get(self, index: int, generator: torch.Generator) -> Item:
        """Return one sample's tensors; raises `BrokenSampleError` where it cannot be read."""

    def permutation(self, generator: torch.Generator) -> Int64[Tensor, "n"]: ...


class Images:
    """A source through a transform."""

    def __init__(self, source: ImageSource, transform: Transform):
        self.source = source
        self.transform = transform

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def get(self, index: int, generator: torch.Generator) -> Item:
        """Return {"image": (C, size, size) in [0, 1], "label", "caption", "index"}."""
        sample = self.source[index]
        image = self.transform(sample.image, generator)
        return {
            "image": image,
            "label": sample.label,
            "caption": sample.caption,
            "index": index,
        }

    def permutation(self, generator: torch.Generator) -> Int64[Tensor, "n"]:
        return self.source.permutation(generator)


class Stream(Dataset):
    """Endless epochs over `data`, each in its own order.

    `stream[position]` adds "skipped" to the item: how many broken samples were passed over, each
    named in the log, before a readable one stood in at the same position. Raises `UserError` after
    `MAX_SKIPPED` in a row.
    """

    def __init__(self, data: TrainingData, seed: int):
        if not len(data):
            raise UserError("training data: no samples")
        self.data = data
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def __getitem__(self, position: int) -> Item:
        for skipped in range(MAX_SKIPPED):
            try:
                generator = keyed_generator(self.seed, "sample", position)
                item = self.data.get(self.index_at(position + skipped), generator)
                return {**item, "skipped": skipped}
            except BrokenSampleError as error:
                logger.warning("sample skipped: %s", error)
                last = error
        raise UserError(f"training data: {MAX_SKIPPED} broken samples in a row, the last {last}")

    def index_at(self, position: int) -> int:
        """Return which sample of the data stands at a position."""
        epoch, place = divmod(position, len(self.data))
        if epoch not in self._orders:
            order = self.data.permutation(keyed_generator(self.seed, "epoch", epoch))
            # The epoch before stays: workers straddle the boundary.
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = order
        return int(self._orders[epoch][place])


class PositionSampler(Sampler[list[int]]):
    """The positions of each micro-batch of one process, for `num_steps` steps from `start_step`.

    `batch_size` is global, per optimiser step. Raises `UserError` unless it divides evenly over
    `accumulation` micro-batches and `world` processes.
    """

    def __init__(
        self,
        start_step: int,
        num_steps: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        slices = accumulation * world
        if batch_size < 1 or batch_size % slices:
            raise UserError(
                f"global batch size {batch_size} does not divide into {accumulation} micro-batches "
                f"on {world} processes: take a multiple of {slices}"
            )
        self.steps = range(start_step, start_step + num_steps)
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size // (self.accumulation * self.world)
        for step in self.steps:
            for micro_batch in range(self.accumulation):
                first = step * self.batch_size + (micro_batch * self.world + self.rank) * size
                yield list(range(first, first + size))


def make_loader(
    stream: Stream,
    *,
    start_step: int,
    num_steps: int,
    batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """Return a loader of this process's micro-batches, collated, in order; see `PositionSampler`.

    It is not to be wrapped by a launcher's own sharding: the split over processes is done here.
    """
    sampler = PositionSampler(start_step, num_steps, batch_size, accumulation, rank, world)
    if num_workers > 0:
        atexit.register(_end_workers)
    return DataLoader(
        stream,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_stopping_to_parent,
        # A loader draws a seed for its workers; from its own generator, so that torch's global
        # state, which dropout uses and resume restores, stays untouched.
        generator=torch.Generator(),
    )


def _leave_stopping_to_parent(worker: int) -> None:
    """Ignore the signals that a terminal or scheduler sends to all processes: training finishes its
    step, for which it needs its workers, which end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers() -> None:
    """Kill the workers of loaders that an error has left open. Python's own end of a program asks
    them by SIGTERM, which they ignore, and would wait for them for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def shard_range(n: int, rank: int, world: int) -> range:
    """Return this process's part of `n` items for evaluation: contiguous, each item exactly once,
    sizes that differ by at most one."""
    return range(n * rank // world, n * (rank + 1) // world)


class HeldOut(Dataset):
    """Data in its own order: item i is sample i, its augmentation a function of (seed, i). A sample
    that cannot be read raises `BrokenSampleError`."""

    def __init__(self, data: TrainingData, seed: int = 0):
        self.data = data
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        return self.data.get(index, keyed_generator(self.seed, "crop", index))


class EvaluationImages(HeldOut):
    """A source through a transform, in its own order."""

    def __init__(self, source: ImageSource, transform: Transform, seed: int = 0):
        super().__init__(Images(source, transform), seed)


class ImageCrops(Dataset):
    """A source in its own order, each picture as `crops` crops of a transform: all that it counts,
    or as many draws of a random one, functions of (seed, i). Item i is read once.

    `crops` is by default all, or one draw; another number than all raises `UserError`.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, crops: int | None = None, seed: int = 0
    ):
        if crops is not None and (crops < 1 or crops != (transform.count or crops)):
            raise UserError(
                f"{crops} crops of '{transform.name}': it makes {transform.count or '1 or more'}"
            )
        self.source = source
        self.transform = transform
        self.crops = crops or transform.count or 1
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        """Return {"image": (crops, C, size, size) in [0, 1], "label", "caption", "index"}."""
        sample = self.source[index]
        if self.transform.count:
            images = self.transform.all_crops(sample.image)
        else:
            draws = range(index * self.crops, (index + 1) * self.crops)
            images = torch.stack(
                [self.transform(sample.image, keyed_generator(self.seed, "crop", d)) for d in draws]
            )
        return {"image": images, "label": sample.label, "caption": sample.caption, "index": index}
