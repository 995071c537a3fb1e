"""Batches that are spread over processes, each with as many rows, taken as one."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def num_processes() -> int:
    started = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if started else 1


def sum_of_processes(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the sum of every process's values, the same bits on all of them."""
    if num_processes() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def mean_of_processes(mean: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the joint batch's mean, given that of each process's rows; without gradients, where
    nothing is trained and processes need not run side by side, the latter.

    The gradient passes whole to the own mean: averaged over processes, as data-parallel training
    does with gradients, it is that of the joint mean.
    """
    if num_processes() == 1 or not torch.is_grad_enabled():
        return mean
    joint = sum_of_processes(mean) / num_processes()
    return mean + (joint - mean).detach()


def rows_of_processes(rows: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    """Return the rows of the joint batch, in rank order on every process."""
    if num_processes() == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(num_processes())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)
