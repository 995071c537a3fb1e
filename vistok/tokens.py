"""TokenSpec: the contract through which tokenizers and generators meet.

A tokenizer states the tokens it makes, a generator the tokens it was built for; nothing else passes
between them. Three kinds cover the field:

- `ids`: int64 (B, *shape), one code of `vocab_size` per position (VQ, FSQ, LFQ);
- `factorised`: int64 (B, *shape, D), one digit per dimension, each with its own number of levels
  (TokenBridge, product quantization), which may stand for numbers;
- `latents`: float (B, *shape, D), continuous vectors (MAR, xAR).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from vistok.errors import IncompatibleTokensError, UserError

Kind = Literal["ids", "factorised", "latents"]
Shape = tuple[int, ...] | tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenSpec:
    """What one image becomes.

    `shape` is `(n,)` for a sequence, `(h, w)` for a grid, `(t, h, w)` for video, or a tuple of
    grids `((1, 1), (2, 2), ...)` for scales, whose tokens lie one scale after another in one axis.
    `ordered` says that any prefix of the sequence, or any first scales, decode to a whole image.
    `values` spells the numbers that the levels of factorised tokens stand for, if they do, as
    `normal(5,3)`; see `vistok.quantizers.DimensionWise`.
    """

    kind: Kind
    shape: Shape
    vocab_size: int | None = None
    levels: tuple[int, ...] | None = None
    dim: int | None = None
    ordered: bool = False
    values: str | None = None

    def __post_init__(self):
        needed = {"ids": "vocab_size", "factorised": "levels", "latents": "dim"}
        if self.kind not in needed:
            raise UserError(f"TokenSpec: kind {self.kind!r} is none of {', '.join(needed)}")
        for kind, field in needed.items():
            if (getattr(self, field) is not None) != (kind == self.kind):
                verb = "needs" if kind == self.kind else "takes no"
                raise UserError(f"TokenSpec: kind '{self.kind}' {verb} {field}")
        if self.values is not None and self.kind != "factorised":
            raise UserError(f"TokenSpec: kind '{self.kind}' takes no values")
        as_tuple = tuple(tuple(s) if isinstance(s, list | tuple) else s for s in self.shape)
        object.__setattr__(self, "shape", as_tuple)
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(self.levels))

    @classmethod
    def ids(cls, shape, vocab_size: int, ordered: bool = False) -> "TokenSpec":
        return cls("ids", shape, vocab_size=vocab_size, ordered=ordered)

    @classmethod
    def factorised(
        cls, shape, levels: tuple[int, ...], ordered: bool = False, values: str | None = None
    ) -> "TokenSpec":
        return cls("factorised", shape, levels=levels, ordered=ordered, values=values)

    @classmethod
    def latents(cls, shape, dim: int, ordered: bool = False) -> "TokenSpec":
        return cls("latents", shape, dim=dim, ordered=ordered)

    @property
    def is_scales(self) -> bool:
        return isinstance(self.shape[0], tuple)

    @property
    def lengths(self) -> Sequence[int]:
        """How many first tokens decode, in rising order: all, or where tokens are ordered any
        number of a sequence, and whole scales."""
        if self.ordered and self.is_scales:
            return tuple(accumulate(h * w for h, w in self.shape))
        if self.ordered and len(self.shape) == 1:
            return range(1, self.num_tokens + 1)
        return (self.num_tokens,)

    @property
    def has_prefixes(self) -> bool:
        """Whether fewer tokens than all decode."""
        return len(self.lengths) > 1

    @property
    def num_tokens(self) -> int:
        """Positions per image."""
        if self.is_scales:
            return sum(h * w for h, w in self.shape)
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits per image at a uniform code; infinite for latents."""
        if self.kind == "latents":
            return math.inf
        levels = (self.vocab_size,) if self.kind == "ids" else self.levels
        return self.num_tokens * sum(math.log2(n) for n in levels)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of one token: () for ids, (D,) otherwise."""
        if self.kind == "ids":
            return ()
        return (len(self.levels) if self.kind == "factorised" else self.dim,)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of one image's tokens, without the batch."""
        positions = (self.num_tokens,) if self.is_scales else self.shape
        return (*positions, *self.value_shape)

    def first(self, length: int) -> "TokenSpec":
        """Return the spec of the first `length` tokens; raise `UserError` unless they decode."""
        *fewer, whole = self.lengths
        if length not in self.lengths:
            fits = ", ".join(map(str, (*fewer, whole))) if fewer else f"all {whole}"
            if isinstance(self.lengths, range):
                fits = f"1 to {whole}"
            raise UserError(f"length {length}: {self} decodes from {fits} tokens")
        if length == whole:
            return self
        first = self.shape[: self.lengths.index(length) + 1] if self.is_scales else (length,)
        return replace(self, shape=first)

    def check(self, tokens: Tensor, where: str) -> None:
        """Raise `UserError` unless `tokens` (B, ...) are tokens of this spec or, where it is
        ordered, a prefix of them; values are not read, so that no device has to wait."""
        integer = not (tokens.is_floating_point() or tokens.dtype == torch.bool)
        found, wanted = tuple(tokens.shape[1:]), self.tensor_shape
        if self.has_prefixes and found and found[0] in self.lengths:
            wanted = (found[0], *wanted[1:])
        if found != wanted or integer == (self.kind == "latents"):
            expected = ", ".join(map(str, ("B", *self.tensor_shape)))
            got = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise UserError(f"{where}: got {got}, expected {self} as ({expected})")

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` is its inverse."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TokenSpec":
        return cls(**fields)

    def __str__(self) -> str:
        size = {
            "ids": f"of {self.vocab_size}",
            "factorised": f"with levels {self.levels}"
            + (f" of values {self.values}" if self.values else ""),
            "latents": f"of dim {self.dim}",
        }[self.kind]
        shape = (
            "+".join(f"{h}x{w}" for h, w in self.shape)
            if self.is_scales
            else "x".join(map(str, self.shape))
        )
        return f"{shape} {'ordered ' if self.ordered else ''}{self.kind} {size}"


def require_same(tokenizer: str, made: TokenSpec, generator: str, wanted: TokenSpec) -> None:
    """Raise `IncompatibleTokensError` unless the generator was built for the tokenizer's tokens.
    One that always makes the whole sequence also fits a tokenizer that would decode less."""
    if made != wanted and replace(made, ordered=False) != wanted:
        raise IncompatibleTokensError(
            f"{tokenizer} makes {made}, but {generator} was built for {wanted}: "
            f"pair it with a tokenizer of {wanted}, or train a generator on these tokens"
        )
