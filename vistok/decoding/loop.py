"""The decode loop: one for every static plan; it knows no generator class."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vistok.decoding.noise import Noise
from vistok.decoding.orders import Order
from vistok.decoding.plans import MaskedPlan, Pass, Plan
from vistok.decoding.sampling import Sampling
from vistok.decoding.schedules import Schedule
from vistok.errors import UserError
from vistok.tokens import TokenSpec

SCHEDULES = ("guidance", "temperature", "budget", "randomness")  # of a `Decoding`


@runtime_checkable
class Plannable(Protocol):
    """What every loop asks of a generator; see `vistok.generators.Generator`."""

    spec: TokenSpec
    head: object

    def plan(self, order: Order | None = None) -> Plan | MaskedPlan: ...
    def with_null(self, condition: object) -> object: ...


@runtime_checkable
class Steppable(Plannable, Protocol):
    """What the loop of static plans asks of a generator beside that."""

    def new_state(self, rows: int, plan: Plan) -> object: ...
    def step(self, tokens: Tensor, condition: object, fed: Pass, state: object) -> Tensor: ...


@dataclass(frozen=True)
class Decoding:
    """How tokens are decoded: the order (None: the model's own) and the schedules of progress.

    `guidance` is the classifier-free scale (Ho & Salimans, 2022), 1 being off; `budget` the inner
    steps of diffusion and flow heads; `randomness` the Gumbel noise of masked decoding. `length`
    stops after that many tokens, where any prefix decodes.
    """

    plan: Order | None = None
    guidance: Schedule = Schedule(1)
    temperature: Schedule = Schedule(1)
    top_k: int = 0
    top_p: float = 1.0
    budget: Schedule = Schedule(1)
    randomness: Schedule = Schedule("linear(4.5,0)")
    length: int | None = None

    def __post_init__(self):
        # Mistakes surface here, before any work, rather than at the first token.
        self.sampling(0.0)
        self.sampling(1.0)

    def changed(self, **changes: object) -> "Decoding":
        """Return a copy with those of `changes` that are not None."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})

    def to_dict(self) -> dict[str, str | float]:
        """JSON form; `Decoding.from_dict` is its inverse."""
        chosen = {} if self.plan is None else {"plan": str(self.plan)}
        if self.length is not None:
            chosen["length"] = self.length
        schedules = {k: str(getattr(self, k)) for k in SCHEDULES}
        return {**chosen, **schedules, "top_k": self.top_k, "top_p": self.top_p}

    @classmethod
    def from_dict(cls, settings: dict[str, str | float]) -> "Decoding":
        order = {"plan": Order(settings["plan"])} if "plan" in settings else {}
        # A checkpoint written before a setting was known decodes by its default.
        schedules = {k: Schedule(settings[k]) for k in SCHEDULES if k in settings}
        return cls(**{**settings, **order, **schedules})

    def plan_of(self, generator: Plannable) -> Plan | MaskedPlan:
        """The passes by which a generator decodes under these settings; raises `UserError` for an
        order or a length that does not fit it."""
        plan = generator.plan(self.plan)
        if self.length is None or self.length == generator.spec.num_tokens:
            return plan
        generator.spec.first(self.length)
        return plan.first(self.length)

    def sampling(self, fraction: float) -> Sampling:
        """How tokens are drawn when `fraction` of them is decoded."""
        return Sampling(self.temperature(fraction), self.top_k, self.top_p)

    def scales(self, plan: Plan | MaskedPlan) -> list[float]:
        """The guidance scale of each pass."""
        return [self.guidance(fraction) for fraction in plan.fractions]


@torch.inference_mode()
def decode(
    generator: Steppable,
    condition: object,
    noise: Noise,
    decoding: Decoding | None = None,
    state: object = None,
    on_pass: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Decode one batch of tokens, (B, *spec.tensor_shape), or the first `decoding.length` of each,
    for `condition`: B labels, or anything else with a length, slices and a device that the
    generator takes.

    The conditional and null halves of guidance run as one batch; the null half is dropped after the
    last pass that needs it. `state` may be that of an earlier call with equal sizes (its memory is
    used again); `on_pass(t, tokens)` sees the tokens after each pass.
    """
    decoding = decoding or Decoding()
    plan = decoding.plan_of(generator)
    if isinstance(plan, MaskedPlan):
        raise UserError(f"order {plan.name} has no fixed positions: use decode_masked")
    plan = plan.to(condition.device)
    spec, batch = generator.spec.first(decoding.length or generator.spec.num_tokens), len(condition)

    scales = decoding.scales(plan)
    guided_passes = max((t + 1 for t, scale in enumerate(scales) if scale != 1), default=0)

    if guided_passes:
        condition = generator.with_null(condition)
    if state is None:
        state = generator.new_state(len(condition), plan)
    state.reset()
    draws = generator.head.draw_noise(noise, spec.num_tokens).to(condition.device)
    tokens = torch.zeros(
        (len(condition), spec.num_tokens, *spec.value_shape),
        dtype=torch.float32 if spec.kind == "latents" else torch.int64,
        device=condition.device,
    )

    for t, fed in enumerate(plan.passes):
        if t == guided_passes and len(condition) > batch:
            condition, tokens = condition[:batch], tokens[:batch]
            state.keep(batch)
        hidden = generator.step(tokens, condition, fed, state)
        sampled = generator.head.sample(
            hidden[:batch],
            hidden[batch:] if len(hidden) > batch and scales[t] != 1 else None,
            scales[t],
            draws[:, fed.predict],
            decoding.sampling(plan.fractions[t]),
            round(decoding.budget(plan.fractions[t])),
        )
        tokens[:, fed.predict] = sampled.repeat(len(tokens) // batch, *[1] * (sampled.ndim - 1))
        if on_pass is not None:
            on_pass(t, tokens[:batch])
    return tokens[:batch].view(batch, *spec.tensor_shape)
