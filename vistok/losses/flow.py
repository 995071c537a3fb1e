"""Flow matching on straight paths between data and noise (Lipman et al., 2022, arXiv:2210.02747;
Liu et al., 2022, arXiv:2209.03003)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.decoding.spelling import read_call
from vistok.errors import UserError

FORMS = {"uniform": 0, "logit_normal": 0, "stratified": 0, "mode": 1}  # numbers that each takes


class FlowTimes:
    """The density of the times that training visits, 1 being noise (Esser et al., 2024,
    arXiv:2403.03206, section 3.1), by its spelling:

    - `uniform`;
    - `logit_normal`: the logistic function of a standard normal;
    - `stratified`: the same, one from each of as many equally likely parts as there are samples;
    - `mode(s)`: uniform, warped towards the middle, or away from it for s < 0.
    """

    def __init__(self, spelling: str):
        self.form, numbers = read_call(spelling, "flow times", FORMS)
        try:
            self.numbers = [float(number) for number in numbers]
        except ValueError:
            self.numbers = []
        if len(self.numbers) != FORMS[self.form]:
            raise UserError(
                f"flow times '{spelling}': expected {', '.join(FORMS)}, with one number for mode"
            )

    def draw(self, batch: int, device: torch.device) -> Float[Tensor, "b"]:
        fresh = torch.randn if self.form == "logit_normal" else torch.rand
        return self.of(fresh(batch, device=device))

    def of(self, draws: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """Return the times that standard normals, for `logit_normal`, or uniform draws lead to."""
        if self.form == "logit_normal":
            return draws.sigmoid()
        if self.form == "stratified":
            strata = torch.arange(len(draws), device=draws.device)
            return torch.special.ndtri((strata + draws) / len(draws)).sigmoid()
        if self.form == "mode":
            bend = (math.pi / 2 * draws).cos().square() - 1 + draws
            return 1 - draws - self.numbers[0] * bend
        return draws


def noised(
    data: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], times: Float[Tensor, "b"]
) -> Float[Tensor, "b c h w"]:
    """Return the points between `data`, at time 0, and `noise`, at time 1."""
    times = times[:, None, None, None]
    return times * noise + (1 - times) * data


def flow_loss(
    velocity: Float[Tensor, "b c h w"],
    data: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
) -> Float[Tensor, "b"]:
    """Return each sample's mean squared error against the velocity of its path, noise less data."""
    return (velocity.float() - (noise - data)).square().mean((1, 2, 3))
