"""What both training loops share: run setup, checkpoints, averages, optimiser, log."""

from vistok.training.checkpoint import Checkpoints, TrainingState
from vistok.training.ema import EMA
from vistok.training.guard import guarded_step, report_non_finite
from vistok.training.log import Window
from vistok.training.optim import OptimizerConfig, accumulate, adamw, set_learning_rate
from vistok.training.progress import Progress, Validation
from vistok.training.run import RunConfig, describe, opened, start_processes
from vistok.training.sharding import shard_like_model
from vistok.training.validation import held_out_batches, held_out_means, spread

__all__ = [
    "EMA",
    "Checkpoints",
    "OptimizerConfig",
    "Progress",
    "RunConfig",
    "TrainingState",
    "Validation",
    "Window",
    "accumulate",
    "adamw",
    "describe",
    "guarded_step",
    "held_out_batches",
    "held_out_means",
    "opened",
    "report_non_finite",
    "set_learning_rate",
    "shard_like_model",
    "spread",
    "start_processes",
]
