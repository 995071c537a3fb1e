"""What every generator takes and returns."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.decoding.loop import Draw
from vistok.decoding.orders import Order
from vistok.decoding.plans import MaskedPlan, Pass, Plan
from vistok.errors import IncompatibleTokensError, UserError
from vistok.generators.conditions import (
    CaptionCondition,
    ClassCondition,
    Condition,
    PromptCondition,
)
from vistok.heads.base import Head
from vistok.models import Model
from vistok.tokens import TokenSpec


@dataclass
class GeneratorOutput:
    """`loss` is the scalar to minimise; `metrics` holds scalars to log."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Generator(Model):
    """Condition to tokens. Trained by `forward`; decoded by `vistok.decoding.decode`, which calls
    `step` once per pass of a plan, or by `decode_masked`, which calls `hidden`. No cache, counter
    or mask lives on the module.

    Attributes: `spec`, the tokens it was built for; `decoded`, what is decoded and then `finish`ed,
    the tokens themselves unless a family says otherwise; `class_names`, in the order of the labels;
    `condition`, class or caption to the first rows; `condition_dropout`, the probability with which
    training replaces it by the null condition; `head`, hidden state to tokens; `kinds`, the
    kinds of tokens the family accepts, and `of_scales`, whether those of scales, and no others;
    `learned`, names of the orders that it can be trained in, where that is an argument.
    """

    kinds: tuple[str, ...] = ("ids",)
    of_scales: bool = False
    learned: tuple[str, ...] = ()
    spec: TokenSpec
    class_names: tuple[str, ...]
    condition: ClassCondition | CaptionCondition | PromptCondition
    condition_dropout: float
    head: Head

    def check_heads(self, dim: int, num_heads: int) -> None:
        """Raise `UserError` unless the heads share the width evenly."""
        if dim % num_heads:
            raise UserError(
                f"{type(self).__name__}: dim {dim} must be a multiple of num_heads {num_heads}"
            )

    def check_spec(self, spec: TokenSpec) -> None:
        """Raise `IncompatibleTokensError` unless this family can model tokens of `spec`."""
        if spec.kind not in self.kinds:
            raise IncompatibleTokensError(
                f"{type(self).__name__} models tokens of kind {' or '.join(self.kinds)}, "
                f"not {spec}: choose a tokenizer of such tokens or another generator"
            )
        if spec.is_scales != self.of_scales:
            wanted = "scales" if self.of_scales else "a sequence or a grid"
            raise IncompatibleTokensError(
                f"{type(self).__name__} models tokens of {wanted}, not {spec}: choose a tokenizer "
                "of such tokens or another generator"
            )

    def check_order(self, order: Order, spec: TokenSpec) -> None:
        """Raise `UserError` for an order that this family does not learn, and
        `IncompatibleTokensError` for one that tokens of `spec` do not have."""
        name = type(self).__name__
        if order.name not in self.learned:
            raise UserError(f"{name} learns in order {' or '.join(self.learned)}, not {order}")
        try:
            order(spec.shape)
        except UserError as error:
            raise IncompatibleTokensError(f"{name} does not fit {spec}: {error}") from None

    def refusal(self, order: Order, reason: str = "") -> UserError:
        """Return the error of decoding by an order that does not fit, with a reason at its end."""
        name, fitting = type(self).__name__, " or ".join(self.orders)
        return UserError(f"{name} of {self.spec} decodes by {fitting}, not by {order}{reason}")

    def take_codes(self, tokenizer: object) -> None:
        """Be shown, before training, the tokenizer whose tokens are learned, for families that are
        fed what these stand for. Here: nothing."""

    def start_from(self, other: "Generator") -> None:
        """Take over the weights of a trained generator, all of which must fit."""
        self.take_over(other.state_dict(), type(other).__name__)

    def plan(self, order: Order | None = None) -> Plan | MaskedPlan:
        """Return the plan of decoding by `order`, by default that of training; raise `UserError`
        for an order that does not fit the model."""
        raise NotImplementedError

    @property
    def orders(self) -> list[str]:
        """The orders that fit, that of training first."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, condition: Condition) -> GeneratorOutput:
        """One training pass; corruption, order and condition dropout happen inside."""
        raise NotImplementedError

    def set_progress(self, fraction: float) -> None:
        """Told before each training step which fraction of the run is over, for families whose
        training changes along it. Here: nothing."""

    @property
    def decoded(self) -> TokenSpec:
        return self.spec

    def finish(self, decoded: Tensor) -> Tensor:
        """Return the tokens of what was decoded, (B, *decoded.tensor_shape)."""
        return decoded

    def null_condition(self, condition: Condition) -> Condition:
        """Return the unconditional condition of the same shape, for guidance."""
        return self.condition.null(condition)

    def with_null(self, condition: Condition) -> Condition:
        """Return the batch of the conditions followed by that of their null conditions."""
        self.condition.check(condition)
        return self.condition.with_null(condition)

    def some_null(self, condition: Condition) -> Condition:
        """In training, return each condition or, with probability `condition_dropout`, its null
        condition; otherwise the conditions."""
        self.condition.check(condition)
        if not self.training:
            return condition
        dropped = torch.rand(len(condition), device=condition.device) < self.condition_dropout
        return self.condition.drop(condition, dropped)

    def new_state(self, rows: int, plan: Plan):
        """Return the state (a key-value cache) of decoding `rows` sequences by `plan`."""
        raise NotImplementedError

    def draw(self, tokens: Tensor, condition: Condition, fed: Pass, state, how: Draw) -> Tensor:
        """Feed the rows of one pass and return the tokens drawn for the positions it predicts: by
        `step` and the head, unless a family draws with the whole network."""
        hidden = self.step(tokens, condition, fed, state)
        null = hidden[how.batch :] if len(hidden) > how.batch and how.scale != 1 else None
        return self.head.sample(
            hidden[: how.batch], null, how.scale, how.noise, how.sampling, how.budget
        )

    def compile_decoding(self, **options) -> None:
        """Compile what `step` repeats, with `torch.compile`'s options; tokens stay the same."""
        raise NotImplementedError

    def step(
        self, tokens: Int64[Tensor, "b n"], condition: Condition, fed: Pass, state
    ) -> Float[Tensor, "b s d"]:
        """Feed the rows of one pass, reading and extending `state`, and return the hidden states of
        the positions it predicts. `tokens` holds what is decoded so far; the rest is not read."""
        raise NotImplementedError
