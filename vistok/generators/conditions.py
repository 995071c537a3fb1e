"""What images are generated from, as the rows that begin a sequence: a class, or a caption as its
features or as the ids of its words.

All know their null form, which training shows now and then so that decoding can be guided by it
(Ho & Salimans, 2022, arXiv:2207.12598).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vistok.errors import UserError


class Texts:
    """A batch of texts as tensors of as many rows each; `mask` is true for real tokens."""

    mask: Bool[Tensor, "b l"]

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: slice | Tensor) -> "Texts":
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def device(self) -> torch.device:
        return self.mask.device

    def to(self, device: torch.device | str) -> "Texts":
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Captions(Texts):
    """Features of a text encoder for a batch of captions, padded on the left with zeros; `mask` is
    true for real tokens."""

    features: Float[Tensor, "b l c"]
    mask: Bool[Tensor, "b l"]

    @classmethod
    def left_padded(
        cls, features: Float[Tensor, "b l c"], lengths: Int64[Tensor, "b"]
    ) -> "Captions":
        """Move the `lengths` real tokens of each row, which come first, to the end."""
        length = features.shape[1]
        source = torch.arange(length, device=features.device) - (length - lengths[:, None])
        mask = source >= 0
        rows = source.clamp(min=0)[:, :, None].expand_as(features)
        return cls(features.gather(1, rows) * mask[:, :, None], mask)


@dataclass(frozen=True)
class Prompts(Texts):
    """Ids of the words of a batch of captions, padded on the left; `mask` is true for real ones."""

    ids: Int64[Tensor, "b l"]
    mask: Bool[Tensor, "b l"]

    @classmethod
    def left_padded(cls, texts: Sequence[Sequence[int]], length: int, padding: int) -> "Prompts":
        """Put `padding` before the first `length` ids of each text."""
        texts = [list(text)[:length] for text in texts]
        ids = torch.tensor([[padding] * (length - len(text)) + text for text in texts])
        lengths = torch.tensor([len(text) for text in texts])
        return cls(ids.long(), torch.arange(length) >= length - lengths[:, None])


Condition = Int64[Tensor, "_"] | Captions | Prompts


class ClassCondition(nn.Embedding):
    """A class as one row; the last row of the table is the null class."""

    rows = 1

    def __init__(self, num_classes: int, dim: int):
        super().__init__(num_classes + 1, dim)

    def forward(self, labels: Int64[Tensor, "b"]) -> Float[Tensor, "b 1 d"]:
        return super().forward(labels)[:, None]

    def null(self, labels: Int64[Tensor, "b"]) -> Int64[Tensor, "b"]:
        return torch.full_like(labels, self.num_embeddings - 1)

    def with_null(self, labels: Int64[Tensor, "b"]) -> Int64[Tensor, "2*b"]:
        return torch.cat([labels, self.null(labels)])

    def drop(self, labels: Int64[Tensor, "b"], dropped: Bool[Tensor, "b"]) -> Int64[Tensor, "b"]:
        return torch.where(dropped, self.null(labels), labels)

    def real_rows(self, labels: Int64[Tensor, "b"]) -> None:
        """Return None: no row is padding."""

    def check(self, labels: object) -> None:
        """Raise `UserError` unless `labels` are class labels; values are not read."""
        if not isinstance(labels, Tensor) or labels.ndim != 1:
            raise UserError("this model is class-conditional: give it labels (B,), not captions")


class CaptionCondition(nn.Module):
    """A caption's features through an MLP, `rows` of them; the null caption is a constant of the
    model that is not trained, and keeps the caption's padding.

    Args:
        caption_dim: channels of the features.
        rows: length to which captions are padded.
        dim: width of the transformer.
    """

    def __init__(self, caption_dim: int, rows: int, dim: int):
        super().__init__()
        self.rows = rows
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.register_buffer("null_features", torch.randn(rows, caption_dim) / caption_dim**0.5)
        self.shape = (rows, caption_dim)

    def forward(self, captions: Captions) -> Float[Tensor, "b l d"]:
        features = captions.features.to(self.fc1.weight.dtype)
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))

    def of(self, features: Float[Tensor, "b l c"], mask: Bool[Tensor, "b l"]) -> Captions:
        """Return the captions that a token cache keeps so."""
        return Captions(features.float(), mask)

    def null(self, captions: Captions) -> Captions:
        return Captions(self.null_features.expand_as(captions.features), captions.mask)

    def with_null(self, captions: Captions) -> Captions:
        features = torch.cat([captions.features, self.null(captions).features])
        return Captions(features, captions.mask.repeat(2, 1))

    def drop(self, captions: Captions, dropped: Bool[Tensor, "b"]) -> Captions:
        null = self.null(captions).features
        return Captions(torch.where(dropped[:, None, None], null, captions.features), captions.mask)

    def real_rows(self, captions: Captions) -> Bool[Tensor, "b l"]:
        """Return which rows are not padding; padding is hidden from all rows but itself."""
        return captions.mask

    def check(self, captions: object) -> None:
        """Raise `UserError` unless `captions` have this model's length and channels."""
        expected = tuple(self.null_features.shape)
        if not isinstance(captions, Captions) or tuple(captions.features.shape[1:]) != expected:
            found = type(captions).__name__
            if isinstance(captions, Captions):
                found = f"captions (B, {', '.join(map(str, captions.features.shape[1:]))})"
            raise UserError(
                f"this model is text-conditional: give it captions (B, {expected[0]}, "
                f"{expected[1]}), not {found}"
            )


class PromptCondition(nn.Embedding):
    """A prompt's ids as embedded rows, and then those of a mark, alike for all, after which the
    image begins. The null prompt is a text as well: of what images are to be guided away from.

    Args:
        vocab_size: of the text; the last id is that of padding.
        length: to which prompts are padded.
        dim: width of the transformer.
        start_ids: of the mark.
        null_ids: of the null prompt.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        dim: int,
        start_ids: Sequence[int] = (),
        null_ids: Sequence[int] = (),
    ):
        super().__init__(vocab_size, dim)
        self.rows, self.shape = length + len(start_ids), (length, None)
        self.register_buffer("start_ids", torch.tensor(list(start_ids)).long(), persistent=False)
        null = Prompts.left_padded([null_ids], length, vocab_size - 1)
        self.register_buffer("null_ids", null.ids, persistent=False)
        self.register_buffer("null_mask", null.mask, persistent=False)

    def forward(self, prompts: Prompts) -> Float[Tensor, "b l d"]:
        start = self.start_ids.expand(len(prompts), -1)
        return super().forward(torch.cat([prompts.ids, start], dim=1))

    def of(self, ids: Int64[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Prompts:
        """Return the prompts that a token cache keeps so."""
        return Prompts(ids, mask)

    def null(self, prompts: Prompts) -> Prompts:
        return Prompts(self.null_ids.expand_as(prompts.ids), self.null_mask.expand_as(prompts.mask))

    def with_null(self, prompts: Prompts) -> Prompts:
        null = self.null(prompts)
        return Prompts(torch.cat([prompts.ids, null.ids]), torch.cat([prompts.mask, null.mask]))

    def drop(self, prompts: Prompts, dropped: Bool[Tensor, "b"]) -> Prompts:
        null, dropped = self.null(prompts), dropped[:, None]
        return Prompts(
            torch.where(dropped, null.ids, prompts.ids),
            torch.where(dropped, null.mask, prompts.mask),
        )

    def real_rows(self, prompts: Prompts) -> Bool[Tensor, "b l"]:
        """Return which rows are not padding; padding is hidden from all rows but itself."""
        return F.pad(prompts.mask, (0, len(self.start_ids)), value=True)

    def check(self, prompts: object) -> None:
        """Raise `UserError` unless `prompts` have this model's length; values are not read."""
        length, _ = self.shape
        if not isinstance(prompts, Prompts) or prompts.ids.shape[1] != length:
            found = type(prompts).__name__
            if isinstance(prompts, Prompts):
                found = f"prompts (B, {prompts.ids.shape[1]})"
            raise UserError(f"this model reads words: give it prompts (B, {length}), not {found}")
