"""Captions in a token cache: the features of real tokens only, in half precision, or their ids.

`captions-N.npy` (rows, dim), of ids (rows,), holds the captions from picture N on, one behind the
other, up to the picture of the next such file: each process appends to its own. `caption_ends.npy`
(count,) says where each caption ends, counting the rows of all files.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int64
from torch import Tensor

from vistok.data.arrays import append_rows, checked, create, mapped, write_rows
from vistok.errors import UserError
from vistok.files import sync

LENGTHS, ENDS, FILES = "caption_lengths.npy", "caption_ends.npy", "captions-*.npy"


@dataclass(frozen=True)
class CaptionSpec:
    """What the text encoder of that name makes of a caption: at most `length` tokens of `dim`
    channels, or as many ids, `dim` being None."""

    encoder: str
    length: int
    dim: int | None

    def __str__(self) -> str:
        return f"{self.size} of {self.encoder}"

    @property
    def size(self) -> str:
        return f"{self.length} ids" if self.dim is None else f"{self.length} x {self.dim}"

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of what is stored of a token."""
        return () if self.dim is None else (self.dim,)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int32 if self.dim is None else np.float16)


class CaptionWriter:
    """The captions' part of a `TokenCacheWriter`."""

    def __init__(self, directory: Path, spec: CaptionSpec, count: int):
        self.directory = directory
        self.spec = spec
        self.count = count
        self._end = -1  # the picture behind the last one written
        self._file = directory

    def allocate(self) -> None:
        for leftover in self.directory.glob(FILES):
            leftover.unlink()
        create(self.directory / LENGTHS, np.dtype(np.int32), (self.count,))

    def write(
        self,
        start: int,
        captions: Float[Tensor, "b l c"] | Int64[Tensor, "b l"],
        mask: Bool[Tensor, "b l"],
    ) -> None:
        """Write the captions of pictures [start, start + b), the rows of each that `mask` names."""
        if tuple(captions.shape[1:]) != (self.spec.length, *self.spec.row):
            raise UserError(
                f"token cache: got captions {tuple(captions.shape)}, expected {self.spec}"
            )
        rows = captions[mask].cpu()
        rows = rows.int() if self.spec.dim is None else rows.half()
        if not torch.isfinite(rows).all():
            raise UserError(
                f"token cache: captions of pictures {start}..{start + len(mask) - 1} are not "
                "finite in half precision"
            )
        if start != self._end:
            self._file = self.directory / FILES.replace("*", f"{start:012d}")
            create(self._file, self.spec.dtype, (0, *self.spec.row))
        append_rows(self._file, rows.numpy())
        write_rows(self.directory / LENGTHS, start, mask.sum(1).cpu().numpy())
        self._end = start + len(mask)

    def finish(self) -> None:
        """Raises `UserError` where pictures were written twice."""
        files = sorted(self.directory.glob(FILES))
        lengths = mapped(self.directory / LENGTHS)
        ends = create(self.directory / ENDS, np.dtype(np.int64), (self.count,))
        np.cumsum(lengths, out=ends)
        ends.flush()
        rows = sum(len(mapped(file)) for file in files)
        if rows != ends[-1]:
            raise UserError(
                f"{self.directory}: {rows} rows of captions for {ends[-1]} tokens: some pictures "
                "were written twice"
            )
        for file in (*files, self.directory / ENDS):
            sync(file)
        (self.directory / LENGTHS).unlink()


class CaptionReader:
    """The captions' part of a `TokenCache`; raises `UserError` for files that do not fit."""

    def __init__(self, directory: Path, spec: CaptionSpec, count: int):
        self.spec = spec
        self._ends = checked(directory / ENDS, np.dtype(np.int64), (count,))
        files = sorted(directory.glob(FILES))
        self._files = [checked(file, spec.dtype, (None, *spec.row)) for file in files]
        self._file_ends = list(accumulate(map(len, self._files)))
        rows = self._file_ends[-1] if files else 0
        if rows != self._ends[-1]:
            raise UserError(
                f"{directory}: {rows} rows of captions in {len(files)} file(s) {FILES}, the index "
                f"says {self._ends[-1]}"
            )

    def get(
        self, index: int
    ) -> tuple[Float16[Tensor, "l c"] | Int64[Tensor, "l"], Bool[Tensor, "l"]]:
        """Return a caption, padded on the left with zeros, and which rows are its own."""
        start, end = (int(self._ends[i]) if i >= 0 else 0 for i in (index - 1, index))
        dtype = torch.int64 if self.spec.dim is None else torch.float16
        caption = torch.zeros(self.spec.length, *self.spec.row, dtype=dtype)
        if start < end:
            file = bisect_right(self._file_ends, start)
            before = self._file_ends[file] - len(self._files[file])
            rows = self._files[file][start - before : end - before]
            caption[start - end :] = torch.from_numpy(np.array(rows))
        return caption, torch.arange(self.spec.length) >= self.spec.length - (end - start)
