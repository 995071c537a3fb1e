"""Plans: what each forward pass is fed and what it predicts, known before the first one.

Every generator here is next-set prediction: pass t predicts a set of positions that are independent
given all earlier sets. A plan lists, for each pass, the rows fed to the network, the positions
predicted, and the (row, head, weight) triples whose logits are averaged for each. The orders that
make plans are in `vistok.decoding.orders`.

One rule covers attention in training and generation: with f(k) the rank in which row k is fed, row
q sees row k where f(k) <= f(q). Keys and values stored in the order of f then make every pass see a
contiguous prefix: generation needs no mask between passes, and training is one forward over all.
Only plans that a model was not trained for (ZipAR) say for themselves where rows are stored and
what they see.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from vistok.errors import UserError
from vistok.tokens import Shape


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass. Rows lie in the order: condition rows, token rows, placeholder rows.

    `tokens` are the positions whose tokens are fed, `cells` the positions whose place each takes
    (the same, but for a stand-in); `placeholders` numbers learned rows without a place. `source`,
    `head` and `weight` (S, M) say from which rows of this pass, through which of the model's heads
    and with which weight each position of `predict` (S,) is predicted; weight 0 fills up.

    `slots`, where given, are the rows' places in the cache, and `sees` the slots that each row
    attends to; without them rows follow those before and `rank` says what they see.

    `correction` is 0 where the positions are predicted for the first time, and otherwise how often
    they were before: then they are fed, too. Whether later sets see the rows of that first time
    (TokenFlow) or of the last (VAR) is the model's.
    """

    condition: Int64[Tensor, "c"]
    tokens: Int64[Tensor, "t"]
    cells: Int64[Tensor, "t"]
    placeholders: Int64[Tensor, "p"]
    rank: tuple[int, ...]
    predict: Int64[Tensor, "s"]
    source: Int64[Tensor, "s m"]
    head: Int64[Tensor, "s m"]
    weight: Float[Tensor, "s m"]
    slots: Int64[Tensor, "r"] | None = None
    sees: Bool[Tensor, "r end"] | None = None
    correction: int = 0

    @classmethod
    def of(
        cls,
        rank: Sequence[int],
        predict: Sequence[int],
        source: Sequence[Sequence[int]],
        head: Sequence[Sequence[int]] | None = None,
        weight: Sequence[Sequence[float]] | None = None,
        condition: Sequence[int] = (),
        tokens: Sequence[int] = (),
        cells: Sequence[int] | None = None,
        placeholders: Sequence[int] = (),
        correction: int = 0,
    ) -> "Pass":
        """Build from plain numbers; the head is 0 and the weight 1 where they are not given."""
        rows = torch.tensor(source, dtype=torch.long).reshape(len(predict), -1)
        return cls(
            condition=torch.tensor(condition, dtype=torch.long),
            tokens=torch.tensor(tokens, dtype=torch.long),
            cells=torch.tensor(tokens if cells is None else cells, dtype=torch.long),
            placeholders=torch.tensor(placeholders, dtype=torch.long),
            rank=tuple(rank),
            predict=torch.tensor(predict, dtype=torch.long),
            source=rows,
            head=torch.zeros_like(rows) if head is None else torch.tensor(head),
            weight=torch.ones(rows.shape) if weight is None else torch.tensor(weight),
            correction=correction,
        )

    def to(self, device: torch.device) -> "Pass":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device) for name, value in tensors.items()})

    @property
    def rows(self) -> int:
        return len(self.rank)

    @cached_property
    @torch.inference_mode(False)
    def mask(self) -> Bool[Tensor, "r r"] | None:
        """Which rows of this pass (second axis) each row sees; None where all see all."""
        if len(set(self.rank)) <= 1:
            return None
        rank = torch.tensor(self.rank, device=self.tokens.device)
        return rank[None, :] <= rank[:, None]

    @cached_property
    @torch.inference_mode(False)
    def block_mask(self) -> BlockMask:
        """`mask` for FlexAttention, which skips the blocks that are hidden whole."""
        rank = torch.tensor(self.rank, device=self.tokens.device)
        return create_block_mask(
            lambda batch, head, query, key: rank[key] <= rank[query],
            None,
            None,
            self.rows,
            self.rows,
            device=rank.device,
        )

    @cached_property
    def is_causal(self) -> bool:
        """Whether each row sees itself and the rows before it, and no other."""
        return all(before < after for before, after in pairwise(self.rank))

    @cached_property
    def is_aligned(self) -> bool:
        """Whether row i, and it alone, predicts the i-th position for all rows."""
        return self.source.tolist() == [[row] for row in range(self.rows)]

    @cached_property
    @torch.inference_mode(False)
    def mixing(self) -> Float[Tensor, "heads s r"]:
        """The triples as matrices: the share of each row in each position, for each head."""
        # No position takes more than one row through a head: there are as many heads as triples.
        heads = self.head.shape[1]
        shares = self.weight.new_zeros(heads, len(self.predict), self.rows)
        position = torch.arange(len(self.predict), device=self.head.device)[:, None]
        return shares.index_put(
            (self.head, position.expand_as(self.head), self.source), self.weight, accumulate=True
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """The passes that decode tokens of `shape`."""

    name: str
    shape: Shape
    passes: tuple[Pass, ...]
    by_pass: bool = False  # whether progress counts passes, as of entities, rather than tokens

    @property
    def rows(self) -> int:
        """Rows fed in all."""
        return sum(fed.rows for fed in self.passes)

    @property
    def length(self) -> int:
        """Rows that a key-value cache holds in the end."""
        ends = [fed.sees.shape[1] for fed in self.passes if fed.sees is not None]
        return max(ends, default=self.rows)

    @property
    def num_placeholders(self) -> int:
        return sum(len(fed.placeholders) for fed in self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    @lru_cache(maxsize=64)  # noqa: B019 - as of `to`
    def first(self, length: int) -> "Plan":
        """Return the passes that decode the first `length` positions; raise `UserError` where the
        order does not decode these first."""
        passes, decoded = [], 0
        for fed in self.passes:
            if decoded == length and not fed.correction:
                break
            passes.append(fed)
            decoded += 0 if fed.correction else len(fed.predict)
        found = torch.cat([fed.predict for fed in passes if not fed.correction]).sort().values
        if found.tolist() != list(range(length)):
            raise UserError(f"order {self.name} does not decode the first {length} tokens first")
        return replace(self, shape=(length,), passes=tuple(passes))

    @property
    def sizes(self) -> list[int]:
        """The number of positions that each pass predicts."""
        return [len(fed.predict) for fed in self.passes]

    @cached_property
    def sets(self) -> list[Pass]:
        """The passes that predict for the first time, each a set of positions."""
        return [fed for fed in self.passes if not fed.correction]

    @cached_property
    def fractions(self) -> list[float]:
        """The fraction of tokens already decoded when each pass begins; `by_pass` the number of the
        set over that of the last."""
        if self.by_pass:
            numbers = accumulate(not fed.correction for fed in self.passes)
            return [(number - 1) / max(1, len(self.sets) - 1) for number in numbers]
        decoded = [0, *accumulate(self.sizes)]
        return [done / decoded[-1] for done in decoded[:-1]]

    @cached_property
    @torch.inference_mode(False)
    def rank_of_position(self) -> Int64[Tensor, "n"]:
        """The number of the set that each position is of."""
        rank = torch.cat([torch.full_like(fed.predict, t) for t, fed in enumerate(self.sets)])
        return rank[torch.cat([fed.predict for fed in self.sets]).argsort()]

    @cached_property
    @torch.inference_mode(False)
    def joint(self) -> Pass:
        """All positions as rows of one pass, in the order of decoding, each seeing those of its own
        set and of the sets before: what models see in training that are fed a set along with
        predicting it."""
        positions = torch.cat([fed.predict for fed in self.sets])
        rank = self.rank_of_position[positions].tolist()
        rows = [[row] for row in range(len(rank))]
        fed = Pass.of(rank, positions.tolist(), rows, tokens=positions.tolist())
        return fed.to(positions.device)

    # Plans outlive the call that first asks for them: their tensors must serve training, too, even
    # where that call runs in inference mode.
    @lru_cache(maxsize=64)  # noqa: B019 - plans are few, cached and live as long as the program
    @torch.inference_mode(False)
    def to(self, device: torch.device) -> "Plan":
        if self.passes[0].predict.device == device:
            return self
        return replace(self, passes=tuple(fed.to(device) for fed in self.passes))

    @cached_property
    @torch.inference_mode(False)
    def training(self) -> Pass:
        """All passes as one: every row at once, under the mask of their ranks."""
        kinds = ("condition", "tokens", "placeholders")
        total = {kind: sum(len(getattr(fed, kind)) for fed in self.sets) for kind in kinds}
        first = {kind: sum(total[k] for k in kinds[:i]) for i, kind in enumerate(kinds)}
        sources, ranks = [], {kind: [] for kind in kinds}
        for fed in self.sets:
            # Row r of the pass becomes the row of the same kind among all of them.
            where, row = [], 0
            for kind in kinds:
                count = len(getattr(fed, kind))
                begin = first[kind] + len(ranks[kind])
                where += range(begin, begin + count)
                ranks[kind] += fed.rank[row : row + count]
                row += count
            sources.append(torch.tensor(where, device=fed.source.device)[fed.source])
        joined = (*kinds, "cells", "predict", "head", "weight")
        return Pass(
            rank=(*ranks["condition"], *ranks["tokens"], *ranks["placeholders"]),
            source=torch.cat(sources),
            **{name: torch.cat([getattr(fed, name) for fed in self.sets]) for name in joined},
        )


@dataclass(frozen=True, eq=False)
class MaskedPlan:
    """The passes of masked decoding of tokens of `shape`: each sees all positions, and confidence
    chooses at run time which tokens stay. Only their number is known before: `masked[t]` positions
    are unknown when pass t begins."""

    name: str
    shape: Shape
    masked: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.masked)

    @property
    def fractions(self) -> list[float]:
        """The fraction of the passes that are over when each begins."""
        return [t / len(self) for t in range(len(self))]

    def first(self, length: int) -> "MaskedPlan":
        """Raise `UserError`: no token is known to be among the first before the last pass."""
        raise UserError(f"order {self.name} decodes all tokens at once, not the first {length}")


class RandomPlan(MaskedPlan):
    """Masked decoding in which a random permutation, each image's own, chooses the positions."""

    @property
    def sizes(self) -> list[int]:
        """The number of positions that each pass predicts."""
        return [before - after for before, after in pairwise((*self.masked, 0))]

    @property
    def fractions(self) -> list[float]:
        """The fraction of tokens decoded when each pass is over; before the last token, for it."""
        n = self.masked[0]
        return [(n - left) / n for left in (*self.masked[1:], 1)]
