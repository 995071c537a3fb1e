"""Masked decoding (MaskGIT, Chang et al., 2022, arXiv:2202.04200): the most confident stay.

All positions begin masked. Each pass sees them all, draws a token for every masked one, and masks
those drawn with the least confidence again. How many is known before (`MaskedPlan`), which is not.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vistok.decoding.loop import Decoding, Plannable
from vistok.decoding.noise import Noise
from vistok.decoding.sampling import gumbel, sample_categorical


@runtime_checkable
class Maskable(Plannable, Protocol):
    """What the loop of masked decoding asks of a generator of ids."""

    mask_token: int

    def hidden(self, tokens: Tensor, condition: object) -> Tensor: ...


@torch.inference_mode()
def decode_masked(
    generator: Maskable,
    condition: object,
    noise: Noise,
    decoding: Decoding | None = None,
    on_pass: Callable[[int, Tensor], None] | None = None,
) -> Int64[Tensor, "b *shape"]:
    """Decode one batch of ids, (B, *spec.shape), for `condition`: B labels.

    With r = (t + 1) / passes in pass t, tokens are drawn from the softmax of the guided logits at
    temperature `decoding.temperature(r) * decoding.randomness(r)`, the latter being that of Gumbel
    noise, and their confidence is their logit over `temperature(r)` plus as much noise again. So
    `randomness` falling to 0 ends greedily, and a temperature of 0 is greedy throughout. The
    guidance of pass t is `decoding.guidance(t / passes)`; both its halves run as one batch, and the
    null half is left out of the passes whose scale is 1. `on_pass(t, tokens)` sees the tokens after
    each pass, masked ones as `generator.mask_token`.
    """
    decoding = decoding or Decoding()
    plan = decoding.plan_of(generator)
    batch, n, device = len(condition), generator.spec.num_tokens, condition.device
    both = generator.with_null(condition)
    draws, doubts = (noise.uniform(len(plan), n).to(device) for _ in range(2))
    tokens = torch.full((batch, n), generator.mask_token, device=device)

    for t, scale in enumerate(decoding.scales(plan)):
        if scale == 1:
            hidden, null = generator.hidden(tokens, condition), None
        else:
            hidden, null = generator.hidden(tokens.repeat(2, 1), both).chunk(2)
        after = (t + 1) / len(plan)
        temperature, randomness = decoding.temperature(after), decoding.randomness(after)
        if temperature == 0:  # the limit, in which noise counts for nothing beside the logits
            temperature, randomness = 1.0, 0.0
        logits = generator.head.guided_logits(hidden, null, scale) / temperature
        sampling = replace(decoding.sampling(plan.fractions[t]), temperature=randomness)
        drawn = sample_categorical(logits, draws[:, t], sampling)
        is_masked = tokens == generator.mask_token
        tokens = torch.where(is_masked, drawn, tokens)
        if t + 1 < len(plan):
            confidence = logits.gather(-1, drawn[..., None])[..., 0]
            confidence = confidence + randomness * gumbel(doubts[:, t])
            doubtful = least(confidence.masked_fill(~is_masked, torch.inf), plan.masked[t + 1])
            tokens = tokens.masked_fill(doubtful, generator.mask_token)
        if on_pass is not None:
            on_pass(t, tokens)
    return tokens.view(batch, *generator.spec.shape)


def least(values: Float[Tensor, "b n"], count: int) -> Bool[Tensor, "b n"]:
    """Return which values are among the `count` least of their row, ties of the last included."""
    return values <= values.kthvalue(count, dim=-1, keepdim=True).values
