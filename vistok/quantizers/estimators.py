"""How the gradient of a code reaches its latent, since the choice of a code has none."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SHORTEST = 1e-6  # length below which vectors are not scaled up to unit length


def straight_through(
    latents: Float[Tensor, "*positions d"], codes: Float[Tensor, "*positions d"]
) -> Float[Tensor, "*positions d"]:
    """Return the codes, up to rounding; their gradient is that of the latents (Bengio et al., 2013,
    arXiv:1308.3432)."""
    return latents + (codes - latents).detach()


def rotated(
    latents: Float[Tensor, "*positions d"], codes: Float[Tensor, "*positions d"]
) -> Float[Tensor, "*positions d"]:
    """Return the codes, up to rounding, as a linear map of the latents, rotation and scaling, that
    is held constant (Fifty et al., 2024, arXiv:2410.06424)."""
    fixed, codes = latents.detach(), codes.detach()
    length, code_length = (v.norm(dim=-1, keepdim=True).clamp(min=SHORTEST) for v in (fixed, codes))
    u, q = fixed / length, codes / code_length
    # Two reflections make the rotation of u to q: one along their bisector, one along u.
    w = F.normalize(u + q, dim=-1)
    along_w, along_u = ((latents * axis).sum(-1, keepdim=True) for axis in (w, u))
    return (latents - 2 * along_w * w + 2 * along_u * q) * (code_length / length)
