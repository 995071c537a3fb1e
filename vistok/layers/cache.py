"""The key-value cache of decoding: allocated once, read only as far as it is filled."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class KVCache:
    """Keys and values of every layer, `length` rows for each of `batch` sequences.

    Rows are appended in the order in which they are fed, so that what a pass may see is always a
    prefix; or, where a plan says so, written to slots of their own. The fill level is a Python
    number that the plan fixes in advance: no device is asked.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        num_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.memory = torch.empty(
            depth, 2, batch, num_heads, length, head_dim, dtype=dtype, device=device
        )
        self.reset()

    def reset(self) -> None:
        """Forget everything and serve all sequences again; the memory stays."""
        self.filled = 0
        self.keep(self.memory.shape[2])

    def keep(self, batch: int) -> None:
        """Serve only the first `batch` sequences from now on."""
        depth = len(self.memory)
        self.layers = [(self.memory[i, 0, :batch], self.memory[i, 1, :batch]) for i in range(depth)]

    def append(
        self, layer: int, key: Float[Tensor, "b h r d"], value: Float[Tensor, "b h r d"]
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new rows and return all rows up to and including them. Rows that are not
        counted by `advance` give way to the next ones; they may be of the first sequences alone."""
        keys, values = (memory[: len(key)] for memory in self.layers[layer])
        rows = key.shape[2]
        keys.narrow(2, self.filled, rows).copy_(key)
        values.narrow(2, self.filled, rows).copy_(value)
        return keys.narrow(2, 0, self.filled + rows), values.narrow(2, 0, self.filled + rows)

    def write(
        self,
        layer: int,
        key: Float[Tensor, "b h r d"],
        value: Float[Tensor, "b h r d"],
        slots: Int64[Tensor, "r"],
        end: int,
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new rows in `slots` and return the rows of the slots before `end`."""
        keys, values = self.layers[layer]
        keys.index_copy_(2, slots, key)
        values.index_copy_(2, slots, value)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, rows: int) -> None:
        """Count rows as filled, once every layer has appended them."""
        self.filled += rows

    def clear(self) -> None:
        """Zero the memory, for plans whose passes read slots that are not yet written."""
        self.memory.zero_()
