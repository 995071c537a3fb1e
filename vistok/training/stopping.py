"""Stop at a step boundary when the machine or the user asks to."""

import signal
import time
from types import FrameType

from accelerate import Accelerator

from vistok.training.processes import any_process

GRACE = 1.0  # seconds: launchers repeat a Ctrl-C that the terminal has already sent


class StopRequest:
    """Within this context, SIGTERM and SIGINT ask for a stop instead of ending the process; a
    second SIGINT, after a moment, ends it at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.requested_at: float | None = None

    def __enter__(self) -> "StopRequest":
        self.previous = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested_at is None:
            self.requested_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.requested_at > GRACE:
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """Return whether any process was asked to stop. Every process must call this."""
        return any_process(self.accelerator, self.requested_at is not None)
