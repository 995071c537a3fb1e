"""The linear map of decoding, and the layout of its weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

FEW_ROWS = range(9, 17)  # for which the product from the left was measured to be the faster one
MOST_ROWS = 160  # up to which weights that lie by columns were measured to be the faster ones


class Linear(nn.Linear):
    """A linear map, by default without bias. For the few rows of a parallel pass a CPU computes
    (W x^T)^T: it reads the weights as they lie, where x W^T first packs them anew at every call."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu:
            return super().forward(x)
        columns, rows = _lent.get().get(self), x.numel() // x.shape[-1]
        if columns is not None:
            return nn.functional.linear(x, columns, self.bias)
        if rows not in FEW_ROWS:
            return super().forward(x)
        out = (self.weight @ x.reshape(rows, -1).t()).t().contiguous()
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


Weights = dict[Linear, Tensor]
_lent: ContextVar[Weights] = ContextVar("weights in another layout", default={})  # noqa: B039


def by_columns(linears: Iterable[Linear]) -> Weights:
    """Return copies of the weights of linear maps, laid out by columns: for some tens of rows a CPU
    multiplies faster by these, which it does not pack anew at every call."""
    return {linear: linear.weight.detach().t().contiguous().t() for linear in linears}


@contextmanager
def laid_out(weights: Weights) -> Iterator[None]:
    """Within, linear maps on a CPU read these weights, which are theirs in another layout."""
    before = _lent.set(weights)
    try:
        yield
    finally:
        _lent.reset(before)
