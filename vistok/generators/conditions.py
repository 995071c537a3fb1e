"""What images are generated from, as the rows that begin a sequence: a class, or a caption.

Both know their null form, which training shows now and then so that decoding can be guided by it
(Ho & Salimans, 2022, arXiv:2207.12598).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vistok.errors import UserError


@dataclass(frozen=True)
class Captions:
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

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> "Captions":
        return Captions(self.features[rows], self.mask[rows])

    @property
    def device(self) -> torch.device:
        return self.features.device

    def to(self, device: torch.device) -> "Captions":
        return Captions(self.features.to(device), self.mask.to(device))


Condition = Int64[Tensor, "_"] | Captions


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

    def forward(self, captions: Captions) -> Float[Tensor, "b l d"]:
        features = captions.features.to(self.fc1.weight.dtype)
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))

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
