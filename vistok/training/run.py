"""The start of a run: processes and precision, one run per directory, and what there is to go on
from."""

import fcntl
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, set_seed
from torch import nn

from vistok.errors import UserError
from vistok.files import replaced
from vistok.training.checkpoint import Checkpoints, TrainingState, progress
from vistok.training.log import JsonLines, rewind
from vistok.training.processes import together

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
FREE = {"output", "resume", "allow_changes"}  # options in which a resumed run may differ
FIXED = {"batch_size"}  # options in which it may not: they say which images a step sees


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out.

    Args:
        precision: of activations; None leaves it to `accelerate launch --mixed_precision`.
            Parameters, moments and averages are float32 always.
        compile: compile the model's forward pass.
        deterministic: only algorithms that give the same bits each time; slower on GPUs.
        num_workers: processes per training process that load data; 0 loads between steps.
        log_every: steps between lines of the log; 0 for none.
        validate_every: steps between held-out scores and validation pictures; 0 for none.
        validation_images: held-out images scored, at most.
        save_every: steps between checkpoints; the last step always makes one.
        keep: newest checkpoints to keep, besides the best; 0 keeps all.
        non_finite: what to do when the loss or gradient of a step is not finite: stop all
            processes, or skip the step on all.
        wandb: name of the wandb project to log to; WANDB_MODE=offline needs no account.
        find_unused_parameters: of DistributedDataParallel, for models that do not use all of
            their parameters in each step.
        timeout_minutes: how long a process waits for another before the run fails.
    """

    precision: Literal["fp32", "bf16", "fp16"] | None = None
    compile: bool = False
    deterministic: bool = False
    num_workers: int = 2
    log_every: int = 50
    validate_every: int = 1000
    validation_images: int = 1000
    save_every: int = 1000
    keep: int = 2
    non_finite: Literal["stop", "skip"] = "stop"
    wandb: str | None = None
    find_unused_parameters: bool = False
    timeout_minutes: float = 10.0


def start_processes(output: str, config: RunConfig, seed: int) -> Accelerator:
    """Return the accelerator of a run. Random numbers are seeded, equally on all processes, so that
    a model made next has the same weights on each."""
    precision = {None: None, "fp32": "no"}.get(config.precision, config.precision)
    # The name that replaces it is not known to the oldest torch in use.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=[JsonLines(Path(output) / LOG), *(["wandb"] if config.wandb else [])],
            kwargs_handlers=[
                # Codebooks are kept equal by their own updates, and the running statistics of a
                # discriminator's norms are never read in training.
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, find_unused_parameters=config.find_unused_parameters
                ),
                InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes)),
            ],
        )
    except ValueError as error:  # a precision that the device lacks
        raise UserError(f"run.precision {config.precision}: {error}") from error
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "FSDP version 1 is not supported: set fsdp_version: 2 in accelerate's config"
        )
    if not accelerator.is_main_process:
        logging.getLogger("vistok").setLevel(logging.WARNING)
    set_seed(seed, deterministic=config.deterministic)
    return accelerator


@contextmanager
def opened(
    checkpoints: Checkpoints, state: TrainingState, resume: bool, allow_changes: bool
) -> Iterator[None]:
    """Hold the run's directory, with `state` restored from the newest checkpoint, if there is one,
    and with log and trackers open. From here on, each process draws its own random numbers.

    Raises `UserError` if another run holds the directory; if there is a checkpoint but `resume` is
    false; or if its options differ from this run's and `allow_changes` is false.
    """
    accelerator, output = checkpoints.accelerator, checkpoints.output
    config = checkpoints.config
    with ExitStack() as held:
        with together(accelerator, f"opening {output}"):
            if accelerator.is_main_process:
                output.mkdir(parents=True, exist_ok=True)
                _lock(held.enter_context(open(output / ".lock", "w")))
                latest = checkpoints.latest()
                if latest:
                    _check_resumption(latest, config, resume, allow_changes)
                rewind(output / LOG, progress(latest)["step"] if latest else 0)
                with replaced(output / "config.yaml") as aside:
                    aside.write_text(yaml.safe_dump(config, sort_keys=False))
        torch.manual_seed(torch.initial_seed() + accelerator.process_index)
        latest = checkpoints.latest()
        if latest:
            checkpoints.load(state, latest)
            logger.info(f"going on from {latest}")
        elif resume:
            logger.info(f"{output} holds no checkpoint yet: starting anew")
        with together(accelerator, "starting the trackers (WANDB_MODE=offline needs no account)"):
            accelerator.init_trackers(
                project_name=config.get("run", {}).get("wandb") or "vistok",
                config=config,
                init_kwargs={"wandb": {"dir": str(output), "name": output.name}},
            )
        yield
        accelerator.end_training()


def _lock(file: TextIO) -> None:
    """Lock `file` until it is closed or the process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        directory = Path(file.name).parent
        raise UserError(
            f"{directory}: another run is writing here; choose another --output"
        ) from None


def _check_resumption(
    latest: Path, config: dict[str, Any], resume: bool, allow_changes: bool
) -> None:
    if not resume:
        raise UserError(
            f"{latest.parents[1]} holds a run at step {progress(latest)['step']}: pass --resume "
            "true to go on with it, or choose another --output"
        )
    changes = differences(yaml.safe_load((latest / "config.yaml").read_text()), config)
    fixed = [change for key, change in changes.items() if key in FIXED]
    if fixed:
        raise UserError(f"{latest}: {fixed[0]} cannot change within a run; choose another --output")
    if changes and not allow_changes:
        raise UserError(
            f"{latest} was made with other options: {', '.join(changes.values())}; pass "
            "--allow_changes true to go on with the new ones"
        )
    for change in changes.values():
        logger.warning(f"changed since {latest.name}: {change}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Return the options that differ, as `key: old -> new` under their dotted keys."""
    old, new = dict(_flat(old)), dict(_flat(new))
    keys = [key for key in {**old, **new} if key not in FREE]
    return {
        key: f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in keys
        if old.get(key, "absent") != new.get(key, "absent")
    }


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def describe(
    accelerator: Accelerator,
    models: dict[str, nn.Module],
    num_steps: int,
    batch_size: int,
    accumulation: int,
    epoch_size: int,
) -> str:
    """Return what will be done, in a few lines: how, for how long, and which parts are trained."""
    share = batch_size // (accelerator.num_processes * accumulation)
    images = num_steps * batch_size
    processes = accelerator.num_processes
    lines = [
        f"{accelerator.device.type}, {accelerator.mixed_precision.replace('no', 'fp32')}, "
        f"{processes} process{'es' if processes > 1 else ''}",
        f"{num_steps:,} steps of {batch_size} images ({processes} x {accumulation} micro-batches "
        f"of {share}): {images:,} images, {images / epoch_size:.1f} epochs of {epoch_size:,}",
    ]
    for name, model in models.items():
        model = accelerator.unwrap_model(model)
        parts = dict(model.named_children())
        parts["(own)"] = nn.ParameterList(model.parameters(recurse=False))
        for part, module in parts.items():
            for trained, word in ((True, "trained"), (False, "frozen")):
                count = sum(p.numel() for p in module.parameters() if p.requires_grad == trained)
                if count:
                    lines.append(f"{word:<8}{count:>14,}  {name}.{part}")
    return "\n".join(lines)
