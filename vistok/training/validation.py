"""Held-out scores, the same images each time, split between the processes by index."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import default_collate

from vistok.data import HeldOut, shard_range
from vistok.training.processes import together


def spread(size: int, count: int) -> list[int]:
    """Return `count` (at most `size`) indices spread evenly: a data set may be sorted by class."""
    count = min(size, count)
    return [i * size // count for i in range(count)]


def held_out_batches(
    accelerator: Accelerator, data: HeldOut, indices: Sequence[int], batch_size: int = 32
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of held-out images on the device."""
    for start in range(0, len(indices), batch_size):
        batch = default_collate([data[i] for i in indices[start : start + batch_size]])
        yield send_to_device(batch, accelerator.device)


@torch.no_grad()
def held_out_means(
    accelerator: Accelerator,
    data: HeldOut,
    count: int,
    scores: Callable[[dict[str, Tensor]], dict[str, Float[Tensor, "b"]]],
) -> dict[str, float]:
    """Return the means of `scores`, one value per image of a batch, over `count` images of `data`.
    Each image is scored once, on any number of processes, in the precision of the weights."""
    indices = spread(len(data), count)
    if accelerator.is_fsdp2:  # its forward pass is a collective: as many batches on each process
        indices = indices[: len(indices) - len(indices) % accelerator.num_processes]
    mine = shard_range(len(indices), accelerator.process_index, accelerator.num_processes)
    rows: list[dict[str, float]] = []
    with (
        together(accelerator, "scoring held-out images"),
        fixed_randomness(accelerator.device),
    ):
        for batch in held_out_batches(accelerator, data, [indices[i] for i in mine]):
            values = scores(batch)
            table = torch.stack(list(values.values()), dim=1).tolist()
            rows += [dict(zip(values, row, strict=True)) for row in table]
    rows = gather_object(rows)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@contextmanager
def fixed_randomness(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Draw the same random numbers each time, and leave those of training untouched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
