"""Decoding in random sets (MAR, Li et al., 2024, arXiv:2406.11838): each image has a permutation of
its own, whose positions are decoded from the end to the start, some in each pass (`RandomPlan`).
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vistok.decoding.loop import Decoding, Plannable
from vistok.decoding.noise import Noise


@runtime_checkable
class Fillable(Plannable, Protocol):
    """What the loop of random sets asks of a generator."""

    def hidden(
        self, tokens: Tensor, condition: object, known: Tensor, wanted: Tensor
    ) -> Tensor: ...


@torch.inference_mode()
def decode_random(
    generator: Fillable,
    condition: object,
    noise: Noise,
    decoding: Decoding | None = None,
    on_pass: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Decode one batch of tokens, shaped as `generator.spec`, for `condition`: B labels.

    Both halves of guidance run as one batch; the null half is left out of the passes whose scale is
    1. No device is asked for positions: how many are known in each pass is. `on_pass(t, tokens)`
    sees the tokens (B, N, C) after each pass, zeros where there are none yet.
    """
    decoding = decoding or Decoding()
    plan, head, spec = decoding.plan_of(generator), generator.head, generator.decoded
    batch, device = len(condition), condition.device
    scales, budgets = decoding.scales(plan), decoding.budgets(plan, head.steps)
    both = generator.with_null(condition)
    order = noise.uniform(spec.num_tokens).to(device).argsort(dim=1)
    tokens = torch.zeros(batch, spec.num_tokens, *spec.value_shape, device=device)

    for t, (before, after) in enumerate(zip(plan.masked, (*plan.masked[1:], 0), strict=True)):
        known, wanted = order[:, before:].sort().values, order[:, after:before].sort().values
        null = None
        if scales[t] == 1:
            hidden = generator.hidden(tokens, condition, known, wanted)
        else:
            halves = (positions.repeat(2, 1) for positions in (known, wanted))
            hidden, null = generator.hidden(tokens.repeat(2, 1, 1), both, *halves).chunk(2)
        sampling = decoding.sampling(plan.fractions[t])
        draws = head.draw_noise(noise, before - after, sampling, budgets[t]).to(device)
        sampled = head.sample(hidden, null, scales[t], draws, sampling, budgets[t])
        tokens.scatter_(1, wanted[:, :, None].expand_as(sampled), sampled)
        if on_pass is not None:
            on_pass(t, tokens)
    return generator.finish(tokens.view(batch, *spec.tensor_shape))
