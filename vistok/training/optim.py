"""AdamW under a warm-up, a cosine and steps."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW, Optimizer

from vistok.errors import UserError

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101).

    Args:
        lr: peak learning rate.
        betas: decay of the first and second moments.
        weight_decay: of matrices and kernels; biases, gains and other vectors have none.
        no_decay: parts of names of further parameters that have none, as `embed`.
        warmup_steps: steps of linear rise to `lr`.
        final_fraction: share of `lr` left at the end of the cosine; 1 keeps `lr` constant.
        milestones: shares of the run after each of which the rate falls by `milestone_factor`.
        milestone_factor: what each milestone multiplies the rate by.
        max_grad_norm: gradients of a larger norm are scaled down to it.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    no_decay: tuple[str, ...] = ()
    warmup_steps: int = 0
    final_fraction: float = 0.1
    milestones: tuple[float, ...] = ()
    milestone_factor: float = 0.2
    max_grad_norm: float = 1.0

    def learning_rate(self, step: int, num_steps: int) -> float:
        """Return the learning rate of `step` (from 0) of `num_steps`. It depends on nothing else,
        so that a resumed run has no schedule to restore."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        lr = self.lr * (self.final_fraction + (1 - self.final_fraction) * cosine)
        return lr * self.milestone_factor ** sum(step >= m * num_steps for m in self.milestones)


def adamw(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Return the optimiser of the trainable parameters, which must be on their device."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError(f"{type(model).__name__}: all parameters are frozen, nothing to train")
    plain = {
        name: p.ndim < 2 or any(part in name for part in config.no_decay)
        for name, p in trained.items()
    }
    groups = [
        {
            "params": [p for name, p in trained.items() if plain[name] == is_plain],
            "weight_decay": 0.0 if is_plain else config.weight_decay,
        }
        for is_plain in (False, True)
    ]
    fused = next(iter(trained.values())).device.type in FUSED_DEVICES
    return AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def accumulate(
    accelerator: Accelerator, model: nn.Module, batches: Iterable[Batch]
) -> Iterator[Batch]:
    """Yield the micro-batches of one step; gradients are exchanged between processes on the last.

    Unlike `accelerator.accumulate` it counts nothing across steps, so that two models can take
    turns within one step."""
    batches = list(batches)
    for batch in batches[:-1]:
        with accelerator.no_sync(model):
            yield batch
    yield batches[-1]
