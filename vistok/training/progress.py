"""What happens between two steps: a line of the log, held-out scores, a checkpoint, and whether to
stop."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vistok.errors import UserError
from vistok.files import replaced
from vistok.training.checkpoint import Checkpoints, TrainingState
from vistok.training.log import Clock
from vistok.training.processes import together
from vistok.training.run import RunConfig
from vistok.training.stopping import StopRequest

logger = logging.getLogger(__name__)


@dataclass
class Validation:
    """Held-out `means`; the `score` that ranks checkpoints, higher is better; and how to `draw` a
    picture, which the main process alone is asked to."""

    means: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    draw: Callable[[], Image.Image] | None = None


class Progress:
    """A context around the training loop.

    Args:
        checkpoints: of this run.
        state: what the loop changes.
        config: the run's cadence.
        num_steps: length of the run.
        batch_size: images per step, on all processes together.
        epoch_size: images in the data.
        validate: returns held-out scores; every process calls it.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        state: TrainingState,
        config: RunConfig,
        num_steps: int,
        batch_size: int,
        epoch_size: int,
        validate: Callable[[], Validation],
    ):
        self.accelerator = checkpoints.accelerator
        self.checkpoints = checkpoints
        self.state = state
        self.config = config
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.epoch_size = epoch_size
        self.validate = validate
        self.clock = Clock()
        self.stop = StopRequest(self.accelerator)

    def __enter__(self) -> "Progress":
        self.context = ExitStack()
        self.context.enter_context(self.stop)
        self.context.enter_context(logging_redirect_tqdm())
        self.bar = self.context.enter_context(
            tqdm(
                desc="training",
                total=self.num_steps * self.batch_size,
                initial=self.state.images,
                unit="img",
                disable=not self.accelerator.is_main_process,
            )
        )
        return self

    def __exit__(self, *exception) -> None:
        self.context.__exit__(*exception)

    def steps(
        self, loader: Iterable[dict[str, Tensor]], accumulation: int
    ) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
        """Yield each step that is left, from 0, with its micro-batches on the device."""
        if self.state.step >= self.num_steps:
            logger.info(f"{self.checkpoints.output} is finished at step {self.state.step}")
            return
        micro_batches = self.clock.timed(loader)
        for step in range(self.state.step, self.num_steps):
            try:
                batches = list(islice(micro_batches, accumulation))
            except UserError as error:
                # A worker process passes its error on as the text of a traceback.
                raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
            batches = send_to_device(batches, self.accelerator.device, non_blocking=True)
            skipped = torch.cat([batch["skipped"] for batch in batches])
            self.state.window.add([], broken_samples=skipped.float().mean())
            yield step, batches

    def end_step(self, **scalars: float) -> bool:
        """Count a step; log, validate and save where due. `scalars` go into the log as they are.
        Returns whether to stop early, the same on every process."""
        state = self.state
        state.step += 1
        state.images += self.batch_size
        state.score = None
        self.clock.images += self.batch_size
        self.bar.update(self.batch_size)
        record: dict[str, Any] = {}
        if self._due(self.config.log_every):
            record |= scalars | state.window.close() | self.clock.read()
            loss, waited = record.get("loss", float("nan")), record["data_wait"]
            self.bar.set_postfix(loss=f"{loss:.4g}", data_wait=f"{waited:.0%}")
        if self._due(self.config.validate_every):
            record |= self._validate()
        if record:
            counted = {
                "images": state.images,
                "epoch": state.images / self.epoch_size,
                "skipped_steps": state.skipped_steps,
            }
            self.accelerator.log(counted | record, step=state.step)
        stopping = self.stop.agreed()
        if stopping or self._due(self.config.save_every) or state.step == self.num_steps:
            self.checkpoints.save(state)
        if stopping:
            logger.info(f"stopped and saved at step {state.step}: --resume true goes on from here")
        if record or stopping:
            self.clock.restart()
        return stopping

    def _due(self, every: int) -> bool:
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.num_steps)

    def _validate(self) -> dict[str, float]:
        validation = self.validate()
        self.state.score = validation.score
        path = self.checkpoints.output / "validation" / f"step-{self.state.step:08d}.png"
        with together(self.accelerator, f"drawing {path}"):
            if validation.draw and self.accelerator.is_main_process:
                picture = validation.draw()
                path.parent.mkdir(exist_ok=True)
                with replaced(path) as aside:
                    picture.save(aside, format="png")
                for tracker in self.accelerator.trackers:
                    if tracker.name == "wandb":
                        tracker.log_images({"validation": [picture]}, step=self.state.step)
        return validation.means
