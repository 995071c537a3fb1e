"""Tar shards in webdataset's layout, read with random access.

The index of `tar_index.py` makes a sample one seek and one read, an epoch a permutation and resume
an integer. Shards are files, or objects of a store that are read by ranges (`storage.py`).
"""

import io
import re
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from vistok.data.sources import BrokenSampleError, ImageSource, Sample, read_image
from vistok.data.storage import Shard, find
from vistok.data.tar_index import Fields, load_or_scan
from vistok.errors import UserError

WINDOW = 16  # shards whose samples are shuffled together


class TarShards(ImageSource):
    """Samples of the tar files that `pattern` names, as in `train-{000000..000012}.tar`, `*.tar` or
    `s3://bucket/train-{000..999}.tar`.

    Members with the same path up to the first dot of the base name form a sample; what follows the
    dot names the field. `image_field` and `label_field` are guessed where that is unambiguous: one
    of jpg, jpeg, png, webp; cls, else the key "label" of json. A label under another key is written
    `json:KEY`; `none` gives every sample class 0. Captions come from txt or caption, else from the
    class. `num_classes` defaults to the highest label plus one. `index` is a directory for the
    index files (default: hidden beside each shard; shards of a store need one).

    Raises `UserError`, naming shard and sample, for a truncated or compressed archive, a pickle
    member, fields that are missing or ambiguous, a label out of range. Links and devices are left
    out, counted and logged. Keys are never used as paths.
    """

    def __init__(
        self,
        pattern: str,
        image_field: str | None = None,
        label_field: str | None = None,
        num_classes: int | None = None,
        index: str | Path | None = None,
    ):
        self.name = pattern
        self.shards = expand(pattern)
        self._versions = [shard.version() for shard in self.shards]
        fields = Fields(image_field, label_field)
        indices = [load_or_scan(shard, fields, index) for shard in self.shards]
        self._keys = [shard.keys for shard in indices]
        self._images = np.concatenate([shard.images for shard in indices])
        self._captions = np.concatenate([shard.captions for shard in indices])
        self._labels = np.concatenate([shard.labels for shard in indices])
        self._ends = np.cumsum([len(shard.keys) for shard in indices])
        if not len(self):
            raise UserError(f"tar shards {pattern}: no sample in {len(self.shards)} shard(s)")
        highest = int(self._labels.max())
        if num_classes is not None and highest >= num_classes:
            shard, key = self._locate(int(self._labels.argmax()))
            raise UserError(
                f"{self.shards[shard]}: {key}: label {highest}, expected 0..{num_classes - 1} for "
                f"{num_classes} classes"
            )
        self.class_names = tuple(map(str, range(num_classes or highest + 1)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        position = range(len(self))[index]  # as sequences check and count indices
        shard, key = self._locate(position)
        where = f"{self.shards[shard]}: {key}"
        spans = [tuple(of[position].tolist()) for of in (self._images, self._captions)]
        try:
            picture, caption = self.shards[shard].read(spans, self._versions[shard])
        except OSError as error:
            raise BrokenSampleError(f"{where}: cannot be read ({error})") from error
        label = int(self._labels[position])
        text = self.class_names[label] if caption is None else caption.decode("utf-8", "replace")
        return Sample(read_image(io.BytesIO(picture), where), label, text.strip(), key)

    def labels(self) -> Int64[Tensor, "n"]:
        return torch.from_numpy(self._labels)

    def permutation(self, generator: torch.Generator) -> Int64[Tensor, "n"]:
        """Shuffle the shards, then the samples within windows of 16 shards: reading stays local."""
        order = torch.randperm(len(self.shards), generator=generator)
        windows = [
            torch.cat([self._positions(int(shard)) for shard in window])
            for window in order.split(WINDOW)
        ]
        return torch.cat(
            [window[torch.randperm(len(window), generator=generator)] for window in windows]
        )

    def _positions(self, shard: int) -> Int64[Tensor, "m"]:
        end = int(self._ends[shard])
        return torch.arange(end - len(self._keys[shard]), end)

    def _locate(self, position: int) -> tuple[int, str]:
        """Return a sample's shard and key."""
        shard = int(np.searchsorted(self._ends, position, side="right"))
        row = position - int(self._ends[shard]) + len(self._keys[shard])
        return shard, self._keys[shard][row].decode("utf-8", "replace")


def expand(pattern: str) -> list[Shard]:
    """Return the shards that a pattern with `{000..012}`, `{a,b}`, `*` and `?` names, in order.

    Raises `UserError` where one that is spelt out is missing, or nothing matches.
    """
    brace = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if brace:
        low, high, listed = brace.groups()
        if listed is None:
            choices = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
        else:
            choices = listed.split(",")
        head, tail = pattern[: brace.start()], pattern[brace.end() :]
        return [path for choice in choices for path in expand(head + choice + tail)]
    found = find(pattern)
    if not found:
        raise UserError(
            f"tar shards: no file {pattern}; expected local or mounted tar files, or a URL"
        )
    return found
