"""Checkpoints from which a run goes on exactly as if it had not been stopped.

    OUTPUT/checkpoints/step-00001000/    everything that decides the next step
    OUTPUT/config.json, *.safetensors    the averaged model, as `from_pretrained` reads it

A checkpoint is written under a dotted name, forced to the disk, renamed, and only then are older
ones removed: whatever carries a name is whole. OUTPUT must be visible to all processes.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vistok.errors import CheckpointError
from vistok.files import publish_directory, publish_files, sync
from vistok.training.ema import EMA
from vistok.training.log import Window
from vistok.training.processes import check_replicas, together
from vistok.training.sharding import (
    load_model_state,
    load_optimizer_moments,
    optimizer_moments,
    unsharded,
)

FORMAT = 1
KEEP_MARK = "keep"  # a checkpoint that holds a file of this name is never removed


@dataclass
class TrainingState:
    """What a step reads and changes, besides torch's random numbers and the data, which are a
    function of `step`.

    `models` and `optimizers` are as `Accelerator.prepare` returned them, under equal names; `score`
    is the held-out score at this step, if it was measured, higher is better.
    """

    models: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    ema: EMA
    window: Window
    step: int = 0
    images: int = 0
    skipped_steps: int = 0
    score: float | None = None


class Checkpoints:
    """The checkpoints of one run.

    Args:
        accelerator: the run's processes, which must call `save` and `load` together.
        output: directory of the run.
        config: the run's options as plain nested values, written beside each checkpoint.
        keep: newest checkpoints to keep, 0 for all; the one of the best score stays too, and any
            that holds a file named `keep`.
    """

    def __init__(self, accelerator: Accelerator, output: Path, config: dict[str, Any], keep: int):
        self.accelerator = accelerator
        self.output = output
        self.directory = output / "checkpoints"
        self.config = config
        self.keep = keep

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        return next(reversed(self._complete()), None)

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.directory.glob("step-*") if re.fullmatch(r"step-\d+", p.name))

    def save(self, state: TrainingState) -> None:
        """Write `state` and export the averaged model.

        A failure on any process (say, a full disk) ends all with `UserError`; earlier checkpoints
        stay as they were.
        """
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        path = self.directory / f"step-{state.step:08d}"
        if path.exists():
            return
        if accelerator.num_processes > 1 and not accelerator.is_fsdp2:
            check_replicas(accelerator, {**state.models, "ema": state.ema})
        weights = {k: accelerator.get_state_dict(model) for k, model in state.models.items()}
        weights["ema"] = accelerator.get_state_dict(state.ema.module)
        moments = {
            k: optimizer_moments(accelerator, state.models[k], optimizer)
            for k, optimizer in state.optimizers.items()
        }
        aside = path.with_name(f".{path.name}")
        doing = f"saving {path}"
        with together(accelerator, doing):
            if main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        try:
            with together(accelerator, doing):
                self._write_own(aside / f"rank-{accelerator.process_index}.pt", state)
                if main:
                    self._write_shared(aside, state, weights, moments)
            with together(accelerator, doing):
                if main:
                    self._export(unsharded(accelerator, state.ema, weights["ema"]))
                    publish_directory(aside, path)
                    self._prune()
        finally:
            if main:
                shutil.rmtree(aside, ignore_errors=True)

    def _write_own(self, path: Path, state: TrainingState) -> None:
        """Write what each process has for itself."""
        torch.save({"random": self._random_state(), "window": state.window.state_dict()}, path)
        sync(path)

    def _write_shared(
        self,
        directory: Path,
        state: TrainingState,
        weights: dict[str, dict[str, Tensor]],
        moments: dict[str, dict[Any, Any]],
    ) -> None:
        """Write what all processes share."""
        for name, tensors in weights.items():
            # A copy each: safetensors refuses weights that are tied.
            copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
            save_file(copies, directory / f"{name}.safetensors")
        scaler = self.accelerator.scaler
        torch.save(
            {"moments": moments, "scaler": scaler.state_dict() if scaler else None},
            directory / "optimizers.pt",
        )
        progress = {
            "format": FORMAT,
            "processes": self.accelerator.num_processes,
            "step": state.step,
            "images": state.images,
            "skipped_steps": state.skipped_steps,
            "ema_updates": int(state.ema.n_averaged),
            "score": state.score,
        }
        (directory / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
        (directory / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))
        for file in directory.iterdir():
            sync(file)

    def _export(self, model: nn.Module) -> None:
        """Write the averaged model where `from_pretrained` looks for it."""
        aside = self.output / ".export"
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        publish_files(aside, self.output)

    def _prune(self) -> None:
        complete = self._complete()
        scores = {path: progress(path)["score"] for path in complete}
        scored = [path for path in complete if scores[path] is not None]
        best = max(scored, key=scores.get, default=None)
        for path in complete[: -self.keep]:
            if path != best and not (path / KEEP_MARK).exists():
                doomed = path.rename(path.with_name(f".{path.name}.old"))
                shutil.rmtree(doomed)

    def load(self, state: TrainingState, path: Path) -> None:
        """Restore what `save` wrote, on any number of processes."""
        accelerator = self.accelerator
        with together(accelerator, f"resuming from {path}"):
            saved = progress(path)
            for name, model in state.models.items():
                load_model_state(accelerator, model, load_file(path / f"{name}.safetensors"))
            load_model_state(accelerator, state.ema.module, load_file(path / "ema.safetensors"))
            optimizers = torch.load(path / "optimizers.pt", "cpu", weights_only=True)
            for name, optimizer in state.optimizers.items():
                moments = optimizers["moments"][name]
                load_optimizer_moments(accelerator, state.models[name], optimizer, moments)
            if accelerator.scaler and optimizers["scaler"]:
                accelerator.scaler.load_state_dict(optimizers["scaler"])
            state.step, state.images = saved["step"], saved["images"]
            state.skipped_steps, state.score = saved["skipped_steps"], saved["score"]
            state.ema.n_averaged.fill_(saved["ema_updates"])
            ranks = [
                torch.load(path / f"rank-{rank}.pt", "cpu", weights_only=True)
                for rank in range(saved["processes"])
            ]
            windows = [rank["window"] for rank in ranks]
            state.window.load_state_dicts(
                windows, accelerator.process_index, accelerator.num_processes
            )
            if accelerator.process_index < len(ranks):
                self._set_random_state(ranks[accelerator.process_index]["random"])
            else:  # a process that the earlier run did not have
                torch.manual_seed(torch.initial_seed() + state.step)

    def _random_state(self) -> dict[str, Tensor]:
        device = self.accelerator.device
        states = {"cpu": torch.get_rng_state()}
        if device.type != "cpu":
            states[device.type] = torch.get_device_module(device).get_rng_state()
        return states

    def _set_random_state(self, states: dict[str, Tensor]) -> None:
        device = self.accelerator.device
        torch.set_rng_state(states["cpu"])
        if device.type != "cpu" and device.type in states:
            torch.get_device_module(device).set_rng_state(states[device.type])


def progress(path: Path) -> dict[str, Any]:
    """Return how far the run was at the checkpoint `path`."""
    saved = json.loads((path / "progress.json").read_text())
    if saved["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: written in format {saved['format']}, this vistok reads up to {FORMAT}: "
            "upgrade vistok"
        )
    return saved
