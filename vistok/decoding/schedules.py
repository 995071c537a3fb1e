"""Schedules of progress: guidance, temperature, inner steps along the fraction decoded."""

import math

from vistok.decoding.spelling import read_call
from vistok.errors import UserError

# name: (numbers it takes, value at fraction f)
_FORMS = {
    "constant": (1, lambda f, a: a),
    "linear": (2, lambda f, a, b: a + (b - a) * f),
    "cosine": (2, lambda f, a, b: b + (a - b) * (1 + math.cos(math.pi * f)) / 2),
    "power_cosine": (3, lambda f, a, b, p: a + (b - a) * (1 - math.cos(math.pi * f**p)) / 2),
    "two_stage": (2, lambda f, a, b: a if f < 0.5 else b),
    "interval": (3, lambda f, a, low, high: a if low <= f <= high else 1.0),
}


class Schedule:
    """A value along decoding; `schedule(f)` at fraction f in [0, 1] of the tokens already decoded.

    Spelt alike in Python, configs and on the command line: `3.0` or `constant(3)`, `linear(50,5)`,
    `cosine(50,5)` (DiSA), `power_cosine(1,4,2.5)` (MaskGIT, RAR: from, to, power),
    `two_stage(50,5)` (changes half-way), `interval(3,0.1,0.8)` (3 inside, 1 outside). Raises
    `UserError` for any other spelling.
    """

    def __init__(self, spelling: "str | float | Schedule"):
        text = str(spelling)
        try:
            self.form, self.numbers = "constant", (float(text),)
        except ValueError:
            self.form, numbers = read_call(text, "schedule", _FORMS)
            try:
                self.numbers = tuple(float(number) for number in numbers)
            except ValueError:
                raise UserError(f"schedule '{text}': {self.form} takes numbers") from None
        wanted = _FORMS[self.form][0]
        if len(self.numbers) != wanted:
            raise UserError(f"schedule '{text}': {self.form} takes {wanted} number(s)")

    def __call__(self, fraction: float) -> float:
        return _FORMS[self.form][1](fraction, *self.numbers)

    def __str__(self) -> str:
        return f"{self.form}({','.join(f'{number:g}' for number in self.numbers)})"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


class Corrected:
    """A schedule of what is predicted for the first time and, after slashes, of its corrections,
    the last for all further ones: `1200/100/1`. Raises `UserError` for any other spelling."""

    def __init__(self, spelling: "str | float | Corrected"):
        self.schedules = tuple(Schedule(part) for part in str(spelling).split("/"))

    def __call__(self, fraction: float, correction: int = 0) -> float:
        return self.schedules[min(correction, len(self.schedules) - 1)](fraction)

    def __str__(self) -> str:
        return "/".join(map(str, self.schedules))

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Corrected) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))
