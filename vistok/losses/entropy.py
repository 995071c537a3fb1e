"""Entropies of the soft assignment of latents to codes (MAGVIT-2: Yu et al., 2023,
arXiv:2310.05737, eq. 4): that of each latent is to be low, that of all of them high."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vistok.layers.processes import mean_of_processes

EPSILON = 1e-5


def assignment_entropies(
    logits: Float[Tensor, "*positions k"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the mean entropy of p = softmax(logits), and the entropy of the mean of p over the
    latents of all processes, in nats."""
    log_p = F.log_softmax(logits.flatten(0, -2), dim=-1)
    p = log_p.exp()
    return -(p * log_p).sum(-1).mean(), entropy_of_mean(mean_of_processes(p.mean(0)))


def entropy_of_mean(p: Float[Tensor, "*shape"], clamped: bool = False) -> Float[Tensor, ""]:
    """Return the entropy of mean probabilities in nats, up to what keeps their logarithms finite:
    1e-5, added to each or, where `clamped`, in place of those below."""
    return -(p * torch.log(p.clamp(min=EPSILON) if clamped else p + EPSILON)).sum()
