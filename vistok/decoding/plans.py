"""Plans: the order of decoding, known before the first forward pass.

Every generator here is next-set prediction: pass t predicts a set of positions that are independent
given all earlier sets. A plan lists, for each pass, the rows fed to the network, the positions
predicted, and the (row, head, weight) triples whose logits are averaged for each. It is a pure
function of the token shape.

One rule covers attention in training and generation: with f(k) the rank in which row k is fed, row
q sees row k where f(k) <= f(q). Keys and values stored in the order of f then make every pass see a
contiguous prefix: generation needs no mask between passes, and training is one forward over all.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass. Rows lie in the order: condition rows, then token rows.

    `source`, `head` and `weight` (S, M) say from which rows of this pass, through which of the
    model's heads and with which weight each position of `predict` (S,) is predicted.
    """

    condition: Int64[Tensor, "c"]
    tokens: Int64[Tensor, "t"]
    rank: tuple[int, ...]
    predict: Int64[Tensor, "s"]
    source: Int64[Tensor, "s m"]
    head: Int64[Tensor, "s m"]
    weight: Float[Tensor, "s m"]

    def to(self, device: torch.device) -> "Pass":
        tensors = [f.name for f in fields(self) if f.name != "rank"]
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    @property
    def rows(self) -> int:
        return len(self.rank)

    @cached_property
    @torch.inference_mode(False)
    def mask(self) -> Bool[Tensor, "r r"] | None:
        """Which rows of this pass (second axis) each row sees; None where all see all."""
        if len(set(self.rank)) == 1:
            return None
        rank = torch.tensor(self.rank, device=self.tokens.device)
        return rank[None, :] <= rank[:, None]

    @cached_property
    def is_causal(self) -> bool:
        """Whether each row sees itself and the rows before it, and no other."""
        return all(before < after for before, after in pairwise(self.rank))

    def gather(self, hidden: Float[Tensor, "b r d"]) -> Float[Tensor, "b s d"]:
        """Return the hidden state that predicts each position. Where several rows share one linear
        head, the mean of their logits is the head of the mean of their hidden states."""
        rows = hidden[:, self.source]
        if rows.shape[2] == 1:
            return rows[:, :, 0]
        return torch.einsum("bsmd,sm->bsd", rows, self.weight.to(rows.dtype))


@dataclass(frozen=True, eq=False)
class Plan:
    """The passes that decode tokens of `shape`."""

    name: str
    shape: tuple[int, ...]
    passes: tuple[Pass, ...]

    @property
    def rows(self) -> int:
        """Rows fed in all, the length of a key-value cache."""
        return sum(fed.rows for fed in self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    @cached_property
    def fractions(self) -> list[float]:
        """The fraction of tokens already decoded when each pass begins."""
        decoded = [0, *accumulate(len(fed.predict) for fed in self.passes)]
        return [done / decoded[-1] for done in decoded[:-1]]

    # Plans outlive the call that first asks for them: their tensors must serve training, too, even
    # where that call runs in inference mode.
    @lru_cache(maxsize=64)  # noqa: B019 - plans are few, cached and live as long as the program
    @torch.inference_mode(False)
    def to(self, device: torch.device) -> "Plan":
        return replace(self, passes=tuple(fed.to(device) for fed in self.passes))

    @cached_property
    @torch.inference_mode(False)
    def training(self) -> Pass:
        """All passes as one: every row at once, under the mask of their ranks."""
        num_conditions = sum(len(fed.condition) for fed in self.passes)
        sources, condition_ranks, token_ranks = [], [], []
        for fed in self.passes:
            # Row r of the pass becomes the row of the same kind among all of them.
            c, t = len(fed.condition), len(fed.tokens)
            first_token = num_conditions + len(token_ranks)
            where = [*range(len(condition_ranks), len(condition_ranks) + c)]
            where += range(first_token, first_token + t)
            sources.append(torch.tensor(where)[fed.source])
            condition_ranks += fed.rank[:c]
            token_ranks += fed.rank[c:]
        gathered = {
            name: torch.cat([getattr(fed, name) for fed in self.passes])
            for name in ("condition", "tokens", "predict", "head", "weight")
        }
        rank = (*condition_ranks, *token_ranks)
        return Pass(rank=rank, source=torch.cat(sources), **gathered)


def next_token_pass(condition: range, fed: list[int], rank: int, predict: int) -> Pass:
    """A pass whose last row predicts one position."""
    rows = len(condition) + len(fed)
    return Pass(
        condition=torch.tensor(list(condition), dtype=torch.long),
        tokens=torch.tensor(fed, dtype=torch.long),
        rank=tuple(range(rank, rank + rows)),
        predict=torch.tensor([predict]),
        source=torch.tensor([[rows - 1]]),
        head=torch.zeros(1, 1, dtype=torch.long),
        weight=torch.ones(1, 1),
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def raster(shape: tuple[int, ...], condition_rows: int = 1) -> Plan:
    """Row by row, one token a pass: N passes (LlamaGen; sequences of 1D tokenizers)."""
    n = math.prod(shape)
    first = next_token_pass(range(condition_rows), [], 0, predict=0)
    rest = [
        next_token_pass(range(0), [t - 1], condition_rows + t - 1, predict=t) for t in range(1, n)
    ]
    return Plan("raster", shape, (first, *rest))
