"""The decode loop: one for every static plan; it knows no generator class."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypedDict, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vistok.decoding.noise import Noise
from vistok.decoding.orders import Order
from vistok.decoding.plans import MaskedPlan, Pass, Plan
from vistok.decoding.samplers import Sampler
from vistok.decoding.sampling import Sampling
from vistok.decoding.schedules import Corrected, Schedule
from vistok.errors import UserError
from vistok.tokens import TokenSpec

SCHEDULES = ("guidance", "temperature", "steps", "randomness")  # of a `Decoding`
FILTERS = ("top_k", "top_p")  # its schedules of first predictions and corrections
RENAMED = {"budget": "steps"}  # settings of older checkpoints


@runtime_checkable
class Plannable(Protocol):
    """What every loop asks of a generator; see `vistok.generators.Generator`. Beside it `head`,
    which is left out here: a module's parts are no attributes to those who ask its class."""

    spec: TokenSpec
    decoded: TokenSpec

    def plan(self, order: Order | None = None) -> Plan | MaskedPlan: ...
    def with_null(self, condition: object) -> object: ...
    def finish(self, decoded: Tensor) -> Tensor: ...


@runtime_checkable
class Steppable(Plannable, Protocol):
    """What the loop of static plans asks of a generator beside that."""

    def new_state(self, rows: int, plan: Plan) -> object: ...
    def step(self, tokens: Tensor, condition: object, fed: Pass, state: object) -> Tensor: ...
    def draw(
        self, tokens: Tensor, condition: object, fed: Pass, state: object, how: "Draw"
    ) -> Tensor: ...


@dataclass(frozen=True)
class Decoding:
    """How tokens are decoded: the order (None: the model's own) and the schedules of progress.

    `guidance` is the classifier-free scale (Ho & Salimans, 2022), 1 being off; `randomness` the
    Gumbel noise of masked decoding. `length` stops after that many tokens, where any prefix
    decodes. `steps` are the inner steps of diffusion and flow heads (None: as many as the head
    takes by itself): a schedule anneals them from the first pass to the last (DiSA: Zhao et al.,
    2025, arXiv:2505.20297). `sampler` is how these heads draw (None: the head's own).
    """

    plan: Order | None = None
    guidance: Schedule = Schedule(1)
    temperature: Schedule = Schedule(1)
    top_k: Corrected = Corrected(0)
    top_p: Corrected = Corrected(1)
    steps: Schedule | None = None
    randomness: Schedule = Schedule("linear(4.5,0)")
    length: int | None = None
    sampler: Sampler | None = None

    def __post_init__(self):
        # Mistakes surface here, before any work, rather than at the first token.
        for correction in range(max(len(k.schedules) for k in (self.top_k, self.top_p))):
            self.sampling(0.0, correction)
            self.sampling(1.0, correction)

    def changed(self, **changes: object) -> "Decoding":
        """Return a copy with those of `changes` that are not None."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})

    def to_dict(self) -> dict[str, str | int]:
        """JSON form; `Decoding.from_dict` is its inverse."""
        spelt = ("plan", "sampler", *SCHEDULES, *FILTERS)
        chosen = {k: str(getattr(self, k)) for k in spelt if getattr(self, k) is not None}
        return chosen if self.length is None else {**chosen, "length": self.length}

    @classmethod
    def from_dict(cls, settings: dict[str, str | float]) -> "Decoding":
        settings = {RENAMED.get(k, k): v for k, v in settings.items()}
        types = {"plan": Order, "sampler": Sampler}
        types |= dict.fromkeys(SCHEDULES, Schedule) | dict.fromkeys(FILTERS, Corrected)
        # A checkpoint written before a setting was known decodes by its default.
        return cls(**{k: types[k](v) if k in types else v for k, v in settings.items()})

    def plan_of(self, generator: Plannable) -> Plan | MaskedPlan:
        """The passes by which a generator decodes under these settings; raises `UserError` for an
        order, a length or a sampler that does not fit it."""
        if self.sampler is not None:
            generator.head.check_sampler(self.sampler.name)
        plan = generator.plan(self.plan)
        if self.length is None or self.length == generator.spec.num_tokens:
            return plan
        generator.spec.first(self.length)
        return plan.first(self.length)

    def sampling(self, fraction: float, correction: int = 0) -> Sampling:
        """How tokens are drawn when `fraction` of them is decoded, for the first time or again."""
        top_k, top_p = (limit(fraction, correction) for limit in (self.top_k, self.top_p))
        return Sampling(self.temperature(fraction), int(top_k), top_p, self.sampler)

    def scales(self, plan: Plan | MaskedPlan) -> list[float]:
        """The guidance scale of each pass."""
        return [self.guidance(fraction) for fraction in plan.fractions]

    def budgets(self, plan: Plan | MaskedPlan, own: Schedule) -> list[int]:
        """The inner steps of each pass, of which the last is the end of the schedule; `own` is that
        of the head."""
        fixed = None if self.sampler is None else self.sampler.steps
        schedule = Schedule(fixed) if fixed else self.steps or own
        # Whole numbers are cut off, not rounded, as the released code does.
        last, nearly = max(1, len(plan) - 1), 1e-9
        return [max(1, int(schedule(t / last) + nearly)) for t in range(len(plan))]

    def calls(self, plan: Plan | MaskedPlan, head: Any) -> list[int]:
        """How often the network that draws the tokens runs in each pass."""
        budgets = zip(plan.fractions, self.budgets(plan, head.steps), strict=True)
        return [head.evaluations(self.sampling(done), budget) for done, budget in budgets]


class DecodingOptions(TypedDict, total=False):
    """The settings of a `Decoding` as options of a command; those given count.

    Args:
        plan: order of decoding, as zipar(16); the checkpoint's by default, as for all of these
        guidance: classifier-free guidance scale, or its schedule
        temperature: of the softmax, 0 taking the most likely token; of the noise of diffusion
        top_k: sample among the k most likely tokens, 0 among all; or a schedule, or after slashes
            those of corrections, as 1200/100/1
        top_p: sample among the most likely tokens that hold this share; or as top_k
        randomness: Gumbel noise of masked decoding, or its schedule
        length: tokens of an image, where any first tokens decode
        steps: of the diffusion or flow of each pass, or their schedule, as linear(50,5)
        sampler: of the diffusion or flow, as ddpm(950)
    """

    plan: Order | None
    guidance: Schedule | None
    temperature: Schedule | None
    top_k: Corrected | None
    top_p: Corrected | None
    randomness: Schedule | None
    length: int | None
    steps: Schedule | None
    sampler: Sampler | None


@dataclass(frozen=True)
class Draw:
    """What the tokens of one pass are drawn with: how many images there are beside their null
    halves, the guidance scale, the noise of the positions, and the inner steps."""

    batch: int
    scale: float
    noise: Tensor
    sampling: Sampling
    budget: int


@dataclass(frozen=True)
class Given:
    """Tokens of images to be edited, (B, N, ...) one after another, of which those `kept`, (N,) or
    (B, N), take the place of what is decoded there: all that is decoded later sees them."""

    tokens: Tensor
    kept: Bool[Tensor, "*b n"]

    def over(self, sampled: Tensor, positions: Int64[Tensor, "s"]) -> Tensor:
        """Return the tokens of `positions`: the kept ones, and those `sampled` elsewhere."""
        kept = self.kept[..., positions].expand(sampled.shape[:2])
        kept = kept.view(*kept.shape, *[1] * (sampled.ndim - 2))
        return torch.where(kept, self.tokens[:, positions], sampled)


@torch.inference_mode()
def decode(
    generator: Steppable,
    condition: object,
    noise: Noise,
    decoding: Decoding | None = None,
    state: object = None,
    on_pass: Callable[[int, Tensor], None] | None = None,
    given: Given | None = None,
) -> Tensor:
    """Decode one batch of tokens, shaped as `spec`, or the first `decoding.length` of each,
    for `condition`: B labels, or anything else with a length, slices and a device that the
    generator takes.

    The conditional and null halves of guidance run as one batch; the null half is dropped after the
    last pass that needs it. `state` may be that of an earlier call with equal sizes (its memory is
    used again); `on_pass(t, tokens)` sees the tokens after each pass; `given` are tokens to be
    kept.
    """
    decoding = decoding or Decoding()
    plan = decoding.plan_of(generator)
    if isinstance(plan, MaskedPlan):
        raise UserError(f"order {plan.name} has no fixed positions: use decode_masked")
    plan = plan.to(condition.device)
    spec, head, batch = generator.decoded, generator.head, len(condition)
    spec = spec.first(decoding.length or spec.num_tokens)

    scales, budgets = decoding.scales(plan), decoding.budgets(plan, head.steps)
    guided_passes = max((t + 1 for t, scale in enumerate(scales) if scale != 1), default=0)

    if guided_passes:
        condition = generator.with_null(condition)
    if state is None:
        state = generator.new_state(len(condition), plan)
    state.reset()
    draws = None
    if not head.samplers:
        times = 1 + max(fed.correction for fed in plan.passes)
        draws = [head.draw_noise(noise, spec.num_tokens).to(condition.device) for _ in range(times)]
    tokens = torch.zeros(
        (len(condition), spec.num_tokens, *spec.value_shape),
        dtype=torch.float32 if spec.kind == "latents" else torch.int64,
        device=condition.device,
    )

    for t, fed in enumerate(plan.passes):
        if t == guided_passes and len(condition) > batch:
            condition, tokens = condition[:batch], tokens[:batch]
            state.keep(batch)
        sampling = decoding.sampling(plan.fractions[t], fed.correction)
        if draws is None:
            share = head.draw_noise(noise, len(fed.predict), sampling, budgets[t]).to(tokens.device)
        else:
            share = draws[fed.correction][:, fed.predict]
        how = Draw(batch, scales[t], share, sampling, budgets[t])
        sampled = generator.draw(tokens, condition, fed, state, how)
        if given is not None:
            sampled = given.over(sampled, fed.predict)
        tokens[:, fed.predict] = sampled.repeat(len(tokens) // batch, *[1] * (sampled.ndim - 1))
        if on_pass is not None:
            on_pass(t, tokens[:batch])
    return generator.finish(tokens[:batch].view(batch, *spec.tensor_shape))
