"""What a run says about itself: means over a window of steps, the speed, and one JSON line each."""

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from torch import Tensor

from vistok.files import replaced

logger = logging.getLogger(__name__)

SLOW_DATA = 0.1  # share of the time spent waiting for data above which the log warns

Batch = TypeVar("Batch")


class Window:
    """Means of scalars, and a histogram of codes, over the steps since the last log line. Sums stay
    on the device until `close`, the only wait for it.

    Args:
        accelerator: whose processes are averaged over.
        vocab_size: number of codes to count; None for none.
    """

    def __init__(self, accelerator: Accelerator, vocab_size: int | None = None):
        self.accelerator = accelerator
        self.vocab_size = vocab_size
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.codes = (
            torch.zeros(self.vocab_size, dtype=torch.int64, device=self.accelerator.device)
            if self.vocab_size
            else None
        )

    def add(self, seen: list[dict[str, Tensor]], **more: Tensor) -> None:
        """Take the scalars of each micro-batch `seen` in a step, and `more` of the whole step. All
        processes must name the same ones."""
        for scalars in [*seen, more]:
            for name, value in scalars.items():
                value = value.detach().float()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
                self.counts[name] = self.counts.get(name, 0) + 1

    def add_codes(self, ids: list[Tensor]) -> None:
        """Count the codes of each micro-batch, if codes are counted."""
        if self.codes is not None:
            flat = torch.cat([i.flatten() for i in ids])
            self.codes.index_add_(0, flat, torch.ones_like(flat))

    def close(self) -> dict[str, float]:
        """Return the means over all processes, and the codebook's use; start a new window."""
        means = {}
        if self.sums:
            counts = torch.tensor(list(self.counts.values()), device=self.accelerator.device)
            totals = torch.stack([torch.stack(list(self.sums.values())), counts])
            total, count = self.accelerator.reduce(totals, "sum").tolist()
            means = {k: s / n for k, s, n in zip(self.sums, total, count, strict=True)}
        if self.codes is not None:
            means |= codebook_use(self.accelerator.reduce(self.codes, "sum"))
        self._clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts, "codes": self.codes}

    def load_state_dicts(self, states: list[dict[str, Any]], rank: int, world: int) -> None:
        """Go on from the windows of all processes of the earlier run, shared out among `world`."""
        self._clear()
        device = self.accelerator.device
        for index, state in enumerate(states):
            mine = index % world == rank
            for name, value in state["sums"].items():
                # Every process names every scalar, if only with zero.
                before = self.sums.get(name)
                value = value.to(device) if mine else torch.zeros_like(value, device=device)
                self.sums[name] = value if before is None else before + value
                self.counts[name] = self.counts.get(name, 0) + mine * state["counts"][name]
            if mine and state["codes"] is not None and self.codes is not None:
                self.codes += state["codes"].to(device)


def codebook_use(counts: Tensor) -> dict[str, float]:
    """Return the share of codes used, their perplexity (e to the entropy) and the count of dead
    codes of a histogram."""
    counts = counts.double().cpu()
    p = counts / counts.sum().clamp(min=1)
    return {
        "codebook_usage": (counts > 0).double().mean().item(),
        "codebook_perplexity": torch.special.entr(p).sum().exp().item(),
        "dead_codes": int((counts == 0).sum()),
    }


class Clock:
    """Images per second, and the share of the time spent waiting for data. What lies between
    `read` and `restart` (validation, saving) does not count."""

    def __init__(self):
        self.restart()
        self.warned = False

    def restart(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield from `batches`, counting the time until each but the first, which waits for the
        loader's processes to start."""
        batches = iter(batches)
        yield next(batches)
        self.restart()
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield batch

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.started
        share = self.waited / elapsed
        if share > SLOW_DATA and not self.warned:
            self.warned = True
            logger.warning(
                f"{share:.0%} of the time is spent waiting for data: raise run.num_workers, or "
                "train on smaller files or a token cache"
            )
        return {"images_per_second": self.images / elapsed, "data_wait": share}


class JsonLines(GeneralTracker):
    """A tracker that appends one JSON object per call to a file."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_) -> None:
        # JSON has no NaN.
        finite = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in values.items()
        }
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")


def rewind(path: Path, step: int) -> None:
    """Drop from a JSON-lines log what a killed run wrote after `step`, and any torn line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (json.JSONDecodeError, TypeError, KeyError):
            continue
        kept.append(line + "\n")
    with replaced(path) as aside:
        aside.write_text("".join(kept))
