"""What every head takes and returns."""

from jaxtyping import Float
from torch import Tensor

from vistok.decoding.noise import Noise
from vistok.decoding.sampling import Sampling
from vistok.models import Component


class Head(Component):
    """Hidden state to the tokens of one set, which are independent given everything decoded."""

    def loss(self, hidden: Float[Tensor, "b s d"], target: Tensor) -> Float[Tensor, "b s"]:
        """Return the negative log-likelihood (or its surrogate) of each target, float32."""
        raise NotImplementedError

    def draw_noise(self, noise: Noise, num_tokens: int) -> Tensor:
        """Draw all the randomness of `num_tokens` tokens, (B, num_tokens, ...): a token's share
        belongs to its position, whatever pass decodes it."""
        raise NotImplementedError

    def sample(
        self,
        hidden: Float[Tensor, "b s d"],
        null: Float[Tensor, "b s d"] | None,
        scale: float,
        noise: Tensor,
        sampling: Sampling,
        budget: int,
    ) -> Tensor:
        """Sample the tokens of one set. `null` is the unconditional half, None where guidance is
        off; `noise` the share of these positions; `budget` the inner (diffusion, flow) steps."""
        raise NotImplementedError
