"""Token caches: a data set as its tokenizer sees it, computed once and memory-mapped.

A directory with `tokens.npy` (count, crops, *token shape), `labels.npy` (count,) and `header.json`,
which names the tokenizer by fingerprint and the transform; a cache of another pair is refused. For
text-conditional generators it holds the captions' features or ids, too: see `vistok.data.captions`.

Several processes write one cache: the first calls `allocate`, all `write` disjoint ranges, the
first calls `finish`, with a barrier after each stage. The header is written last, so that without
one the directory is no cache.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vistok.data.arrays import checked, create, mapped, write_rows
from vistok.data.captions import CaptionReader, CaptionSpec, CaptionWriter
from vistok.data.transforms import Transform
from vistok.errors import UserError
from vistok.files import replaced, sync
from vistok.tokens import TokenSpec

FORMAT = 1
TOKENS, LABELS, HEADER = "tokens.npy", "labels.npy", "header.json"
UNWRITTEN = -1  # in place of a label


@dataclass(frozen=True)
class TokenCacheHeader:
    """What a cache holds: `crops` versions of each of `count` pictures of `source`, transformed by
    `transform`, tokenized as `spec` by the tokenizer of that `fingerprint`; and their captions."""

    fingerprint: str
    spec: TokenSpec
    transform: Transform
    source: str
    class_names: tuple[str, ...]
    count: int
    crops: int = 1
    latent_dtype: Literal["float32", "float16"] = "float32"
    captions: CaptionSpec | None = None

    @property
    def dtype(self) -> np.dtype:
        """The stored type: the smallest of uint16 and int32 that holds every id."""
        if self.spec.kind == "latents":
            return np.dtype(self.latent_dtype)
        return np.dtype(np.uint16 if self.num_ids <= 2**16 else np.int32)

    @property
    def num_ids(self) -> int:
        return max(self.spec.levels or (self.spec.vocab_size,))

    @property
    def array_shape(self) -> tuple[int, ...]:
        return (self.count, self.crops, *self.spec.tensor_shape)

    def to_json(self) -> str:
        fields = asdict(self) | {"spec": self.spec.to_dict(), "dtype": self.dtype.name}
        if self.captions is None:
            del fields["captions"]  # as it was before there were any
        return json.dumps({"format": FORMAT, **fields}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "TokenCacheHeader":
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        fields = json.loads(text)
        if (found := fields.pop("format")) != FORMAT:
            raise ValueError(f"format {found}, this vistok reads {FORMAT}")
        del fields["dtype"]
        fields["spec"] = TokenSpec.from_dict(fields["spec"])
        fields["transform"] = Transform(**fields["transform"])
        fields["class_names"] = tuple(fields["class_names"])
        if "captions" in fields:
            fields["captions"] = CaptionSpec(**fields["captions"])
        return cls(**fields)


class TokenCacheWriter:
    """Writes a cache; see the module for the order of calls."""

    def __init__(self, directory: str | Path, header: TokenCacheHeader):
        self.directory = Path(directory)
        self.header = header
        self._captions = None
        if header.captions is not None:
            self._captions = CaptionWriter(self.directory, header.captions, header.count)

    def allocate(self) -> None:
        """Make the directory and arrays of full size; raises `UserError` over a finished cache."""
        if (self.directory / HEADER).exists():
            raise UserError(f"{self.directory}: already holds a token cache; remove it first")
        self.directory.mkdir(parents=True, exist_ok=True)
        create(self.directory / TOKENS, self.header.dtype, self.header.array_shape)
        create(self.directory / LABELS, np.dtype(np.int64), (self.header.count,))[:] = UNWRITTEN
        if self._captions is not None:
            self._captions.allocate()

    def write(
        self,
        start: int,
        tokens: Tensor,
        labels: Int64[Tensor, "b"],
        captions: Float[Tensor, "b l c"] | Int64[Tensor, "b l"] | None = None,
        caption_mask: Bool[Tensor, "b l"] | None = None,
    ) -> None:
        """Write pictures [start, start + b): tokens (b, crops, *token shape), their labels and, if
        the header names captions, these, `caption_mask` being true for tokens."""
        end = start + len(labels)
        if (captions is None) != (self._captions is None):
            raise UserError(f"token cache: the header says captions {self.header.captions}")
        if not 0 <= start <= end <= self.header.count:
            raise UserError(
                f"token cache: pictures {start}..{end - 1} of a cache of {self.header.count}"
            )
        if tuple(tokens.shape) != (len(labels), *self.header.array_shape[1:]):
            raise UserError(
                f"token cache: got tokens {tuple(tokens.shape)} for {len(labels)} labels, expected "
                f"({len(labels)}, {', '.join(map(str, self.header.array_shape[1:]))})"
            )
        self.header.spec.check(tokens.flatten(0, 1), "token cache")
        if self.header.spec.kind == "latents":
            tokens = tokens.float()  # numpy knows no bfloat16
        elif tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.header.num_ids:
                raise UserError(
                    f"token cache: ids {low}..{high}, expected 0..{self.header.num_ids - 1}"
                )
        if self._captions is not None:
            self._captions.write(start, captions, caption_mask)
        write_rows(self.directory / TOKENS, start, tokens.cpu().numpy())
        write_rows(self.directory / LABELS, start, labels.cpu().numpy())

    def finish(self) -> None:
        """Force the arrays to the disk and write the header; raises `UserError` while a picture is
        missing."""
        missing = np.flatnonzero(mapped(self.directory / LABELS) == UNWRITTEN)
        if len(missing):
            raise UserError(
                f"{self.directory}: {len(missing)} of {self.header.count} pictures were never "
                f"written, the first is {missing[0]}"
            )
        if self._captions is not None:
            self._captions.finish()
        sync(self.directory / TOKENS)
        sync(self.directory / LABELS)
        with replaced(self.directory / HEADER) as aside:
            aside.write_text(self.header.to_json())


class TokenCache:
    """A finished cache, read like `Images`: each access takes one of the crops at random.

    Raises `UserError` for a directory that is no cache, or whose arrays do not fit its header.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.header = self._read_header()
        self.name = str(directory)
        self.spec = self.header.spec
        self.class_names = self.header.class_names
        count = self.header.count
        self._tokens = checked(self.directory / TOKENS, self.header.dtype, self.header.array_shape)
        self._labels = checked(self.directory / LABELS, np.dtype(np.int64), (count,))
        self._captions = None
        if self.header.captions is not None:
            self._captions = CaptionReader(self.directory, self.header.captions, count)

    def __reduce__(self):
        # A memory map pickles as its content; a worker process maps the files itself.
        return type(self), (self.directory,)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def check(self, fingerprint: str, transform: Transform) -> None:
        """Raise `UserError` unless the cache was made by this tokenizer and this transform."""
        if self.header.fingerprint != fingerprint:
            raise UserError(
                f"{self.directory}: made by another tokenizer (fingerprint "
                f"{self.header.fingerprint[:12]}, yours is {fingerprint[:12]}): make it again"
            )
        if self.header.transform != transform:
            raise UserError(
                f"{self.directory}: made with {self.header.transform}, yours is {transform}: make "
                f"it again or change the transform"
            )

    def check_captions(self, length: int, dim: int | None) -> None:
        """Raise `UserError` unless the cache holds captions of that size, ids if `dim` is None."""
        held = self.header.captions
        if held is None:
            raise UserError(
                f"{self.directory}: holds no captions, and the generator is text-conditional: make "
                "it again with vistok cache --text_encoder PATH"
            )
        if (held.length, held.dim) != (length, dim):
            wanted = replace(held, length=length, dim=dim).size
            raise UserError(
                f"{self.directory}: holds captions {held}, the generator takes {wanted}"
            )

    def __len__(self) -> int:
        return self.header.count

    def get(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return {"tokens": int64 or float32, shaped as `spec`, "label", "index"}; where there are
        captions, also "captions" (length, dim) in float16, or ids (length,), padded on the left,
        and "caption_mask" (length,), true for tokens."""
        crop = int(torch.randint(self.header.crops, (), generator=generator))
        dtype = np.float32 if self.spec.kind == "latents" else np.int64
        tokens = torch.from_numpy(self._tokens[index, crop].astype(dtype))
        item = {"tokens": tokens, "label": int(self._labels[index]), "index": index}
        if self._captions is not None:
            item["captions"], item["caption_mask"] = self._captions.get(index)
        return item

    def labels(self) -> Int64[Tensor, "n"]:
        return torch.from_numpy(np.array(self._labels))

    def permutation(self, generator: torch.Generator) -> Int64[Tensor, "n"]:
        """Return the order of one epoch."""
        return torch.randperm(len(self), generator=generator)

    def _read_header(self) -> TokenCacheHeader:
        try:
            text = (self.directory / HEADER).read_text()
        except OSError as error:
            raise UserError(
                f"{self.directory}: no finished token cache ({HEADER} is missing)"
            ) from error
        try:
            return TokenCacheHeader.from_json(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.directory}/{HEADER}: not a cache's header ({error})") from error
