"""The floor of a device ("Roofline", Williams et al., 2009): no program is done before its weights
are read and its products are made, each at the best rate that the device reaches.

`count_work` watches a program run, whatever it computes. What it counts, and what it leaves out:

- *products*: two FLOPs for each multiplication of matrix products, convolutions and attention,
  where masked keys count, too. Norms, activations, rotations, softmax, sorting and random numbers
  do not count.
- *reads*: the weights of each of these products, once for each time that it is made, however large
  the batch; and the keys and values that each attention sees, its own included. Biases, vectors of
  norms, rows of embedding tables and activations, which can stay on the chip, do not count.

So a network that is called once a pass has its weights read once a pass, and a head that takes 100
steps for each set of tokens 100 times. It is the work of the program as it runs: one that makes a
product twice has the higher floor.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

ATTENTION = torch.ops.aten.scaled_dot_product_attention
WITH_SUMMAND = {torch.ops.aten.addmm, torch.ops.aten.baddbmm}  # which comes before the factors
COPIES = {torch.ops.aten.clone, torch.ops.aten._to_copy}  # of weights are weights


@dataclass(frozen=True)
class Rates:
    """What a device reaches: bytes read and FLOPs made in a second."""

    reading: float
    multiplying: float

    def best(self, other: "Rates") -> "Rates":
        """Return the higher of each: other jobs may slow a device, nothing makes it faster."""
        return Rates(max(self.reading, other.reading), max(self.multiplying, other.multiplying))


@dataclass(frozen=True)
class Work:
    """The bytes that a program reads, and the FLOPs of its products."""

    read: int
    multiplied: int

    def floor(self, rates: Rates) -> float:
        """Return the seconds below which no device of these rates does it."""
        return max(self.read / rates.reading, self.multiplied / rates.multiplying)

    def bound(self, rates: Rates) -> str:
        """Return which of the two takes these seconds."""
        is_read = self.read / rates.reading > self.multiplied / rates.multiplying
        return "reads" if is_read else "products"


class _Counter(TorchDispatchMode):
    """Sees every operation on its way to the device, and adds up those that count."""

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__()
        self.read = self.multiplied = 0
        held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self.weights = {_memory(t): t for t in held if t.numel()}  # all kept: no memory is reused

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        operation = getattr(func, "overloadpacket", func)
        if operation is ATTENTION:
            query, key, value = args[:3]
            self.multiplied += sdpa_flop_count(query.shape, key.shape, value.shape)
            self.read += _size(key) + _size(value)
            return func(*args, **kwargs)
        if operation not in flop_registry:
            with self:  # what consists of others is counted by them
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        made = func(*args, **kwargs)
        if operation in flop_registry:
            self.multiplied += flop_registry[operation](*args, **kwargs, out_val=made)
            factors = args[1:3] if operation in WITH_SUMMAND else args[:2]
            self.read += sum(_size(factor) for factor in factors if self.is_weight(factor))
        elif operation in COPIES and self.is_weight(args[0]):
            self.weights[_memory(made)] = made
        return made

    def is_weight(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self.weights


def count_work(run: Callable[[], Any], *modules: nn.Module) -> tuple[Work, Any]:
    """Return what `run`, which computes by the weights of `modules`, needs, and what it returns.
    Programs that are compiled run as they were before."""
    counter = _Counter(modules)
    # Autograd would take composed operations apart before they can be seen whole.
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"), counter:
        returned = run()
    return Work(counter.read, counter.multiplied), returned


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure reading more than any cache holds, and a large matrix product of `dtype`."""
    cuda = device.type == "cuda"
    memory = torch.ones(2 ** (16 if cuda else 14), 4096, device=device)
    square = torch.randn(2 * [8192 if cuda else 2048], device=device).to(dtype)
    read = min(timed(f, device)[0] for f in 5 * [memory.sum, lambda: memory @ memory[0]])
    multiplied = min(timed(f, device)[0] for f in 5 * [lambda: square @ square])
    return Rates(memory.nbytes / read, 2 * len(square) ** 3 / multiplied)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds that `run` takes until the device is done, and what it returns."""
    began = time.perf_counter()
    returned = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, returned


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's numbers, those once that several of its places share."""
    lengths = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(n for n, stride in lengths if stride)
