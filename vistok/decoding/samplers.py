"""How iterative heads draw: samplers of diffusion and of flows, by their spelling."""

from vistok.decoding.spelling import read_call
from vistok.errors import UserError

# name: least and most numbers that it takes
_FORMS = {
    "ddpm": (0, 1),
    "sections": (1, 100),
    "ddim": (0, 1),
    "dpm": (0, 0),
    "dpm_pp": (0, 0),
    "euler": (0, 0),
    "euler_maruyama": (0, 0),
    "flowar": (0, 1),
}


class Sampler:
    """A sampler, spelt alike in Python, configs and on the command line. How many steps it takes is
    the `steps` of a `Decoding`. For diffusion over times 0..999:

    - `ddpm`: the ancestral chain over evenly spaced times (MAR); `ddpm(950)` begins at 950 at the
      latest and drops what then is double (DiSA);
    - `sections(3,3,2,0)`: ancestral, so many steps in each of as many equal parts of the times;
    - `ddim`: the deterministic chain over multiples of a stride; `ddim(980)` ends there and shifts
      its times for any number of steps (DiSA);
    - `dpm`, `dpm_pp`: DPM-Solver and DPM-Solver++ of first order.

    For flows from time 1 to 0:

    - `euler`: even steps;
    - `euler_maruyama`: the reverse stochastic equation down to 0.04, then one step (xAR);
    - `flowar`: Euler steps that are finer below 0.3; `flowar(0.9)` guides at times up to 0.9 alone.

    Raises `UserError` for any other spelling.
    """

    def __init__(self, spelling: "str | Sampler"):
        text = str(spelling)
        self.name, numbers = read_call(text, "sampler", _FORMS)
        least, most = _FORMS[self.name]
        try:
            self.numbers = tuple(float(number) for number in numbers)
        except ValueError:
            raise UserError(f"sampler '{text}': {self.name} takes numbers") from None
        if not least <= len(self.numbers) <= most:
            count = str(least) if least == most else f"{least} to {most}"
            raise UserError(f"sampler '{text}': {self.name} takes {count} number(s)")

    @property
    def steps(self) -> int | None:
        """The number of steps where the spelling fixes it."""
        return int(sum(self.numbers)) if self.name == "sections" else None

    def __str__(self) -> str:
        inside = ",".join(f"{number:g}" for number in self.numbers)
        return f"{self.name}({inside})" if inside else self.name

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sampler) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))
