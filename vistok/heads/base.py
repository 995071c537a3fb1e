"""What every head takes and returns."""

from jaxtyping import Float
from torch import Tensor

from vistok.decoding.noise import Noise
from vistok.decoding.sampling import Sampling
from vistok.decoding.schedules import Schedule
from vistok.errors import UserError
from vistok.models import Component
from vistok.tokens import TokenSpec

PLAIN = Sampling()


class Head(Component):
    """Hidden state to the tokens of one set, which are independent given everything decoded unless
    the head says that it draws them jointly.

    Attributes: `samplers`, names of those by which an iterative head draws, the default first;
    `steps`, how many steps it takes where decoding does not say; empty and 1 for heads that draw in
    one go, which read neither.
    """

    samplers: tuple[str, ...] = ()
    steps: Schedule = Schedule(1)

    def loss(self, hidden: Float[Tensor, "b s d"], target: Tensor) -> Float[Tensor, "b s"]:
        """Return the negative log-likelihood (or its surrogate) of each target, float32."""
        raise NotImplementedError

    def draw_noise(
        self, noise: Noise, num_tokens: int, sampling: Sampling = PLAIN, budget: int = 1
    ) -> Tensor:
        """Draw all the randomness of `num_tokens` tokens, (B, num_tokens, ...). Heads that draw in
        one go are asked for all tokens at once, so that a token's share belongs to its position
        whatever pass decodes it; iterative ones pass by pass, whose `budget` steps need as many
        numbers."""
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

    def evaluations(self, sampling: Sampling, budget: int) -> int:
        """Return how often the network that draws runs for one set of tokens."""
        return 1

    def check_sampler(self, name: str) -> None:
        """Raise `UserError` unless the head draws by the sampler of that name."""
        if name not in self.samplers:
            known = f"only {', '.join(self.samplers)}" if self.samplers else "it draws in one go"
            raise UserError(f"{type(self).__name__} has no sampler '{name}': {known}")


class ValueHead(Head):
    """A head that models vectors of numbers, and so serves any trunk that yields a hidden state for
    each: what is configured are its own sizes, and `fitted` adds the layers that depend on the
    trunk and on the tokens.

    `target` and what `sample` returns are values (B, S, C), whatever lies between.
    """

    def fitted(self, hidden_dim: int, spec: TokenSpec) -> "ValueHead":
        """Return a head of the same configuration, with fresh layers for hidden states of
        `hidden_dim` channels and the tokens of `spec`, whose values have C = `spec.value_shape`."""
        head = type(self).from_config(self.arguments)
        head.build(hidden_dim, spec)
        return head

    def build(self, hidden_dim: int, spec: TokenSpec) -> None:
        """Make the layers."""
        raise NotImplementedError
