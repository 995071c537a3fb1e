"""Decisions that all processes take together, so that none is left waiting in a collective."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vistok.errors import UserError


def any_process(accelerator: Accelerator, flag: bool | Tensor) -> bool:
    """Return whether `flag` holds on any process: one answer for all."""
    if accelerator.num_processes == 1:
        return bool(flag)
    votes = torch.as_tensor(flag, device=accelerator.device).float()
    return bool(accelerator.reduce(votes, "sum") > 0)


@contextmanager
def together(accelerator: Accelerator, doing: str) -> Iterator[None]:
    """Turn an error in the body on any process into the end of all: the process that failed raises
    `UserError`, the others leave with exit code 2. A barrier otherwise."""
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    except Exception as caught:
        error = UserError(f"{doing}: {type(caught).__name__}: {caught}")
        error.__cause__ = caught
    failed = any_process(accelerator, error is not None)
    if error is not None:
        raise error
    if failed:
        sys.exit(2)


@torch.no_grad()
def check_replicas(accelerator: Accelerator, modules: dict[str, nn.Module]) -> None:
    """Raise `RuntimeError` unless every process holds the same parameters, bit for bit."""
    names, sums = [], []
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            bits = parameter.view(torch.int32 if parameter.element_size() == 4 else torch.int16)
            names.append(f"{prefix}.{name}")
            sums.append(bits.sum(dtype=torch.int64))
    everyone = accelerator.gather(torch.stack(sums).unsqueeze(0))
    differing = (everyone != everyone[0]).any(0).tolist()
    if any(differing):
        raise RuntimeError(
            f"{sum(differing)} parameters differ between processes, first "
            f"{names[differing.index(True)]}: an update ran on some processes only"
        )
