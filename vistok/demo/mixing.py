"""Editing by tokens, without training: those of two pictures mixed in one (Lao Beyer et al., 2025,
arXiv:2506.08257), or a part of them decoded anew.

What is taken is a mask over positions: a rectangle of a grid, or what follows the first tokens of a
sequence, or the first scales.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from vistok.codec import payload_size
from vistok.curves import decode_first
from vistok.data.transforms import to_float, to_uint8
from vistok.decoding import Given, MaskedPlan
from vistok.decoding.editing import box
from vistok.demo.previews import Preview, stream
from vistok.errors import UserError
from vistok.generators import Condition
from vistok.metrics import psnr
from vistok.pipelines import ImagePipeline
from vistok.tokenizers import Tokenizer
from vistok.tokens import TokenSpec


def fitted(model: Tokenizer, picture: Image.Image) -> Float[Tensor, "1 3 h w"]:
    """Return the centre of a picture (RGB) at the tokenizer's size, as a batch of one."""
    height, width = model.image_size
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    return to_float(picture)[None].to(model.device)


@dataclass(frozen=True)
class Reconstruction:
    """A picture, what its first `length` tokens make of it, and what they cost."""

    original: Float[Tensor, "1 3 h w"]
    image: Float[Tensor, "1 3 h w"]
    spec: TokenSpec
    length: int

    def __str__(self) -> str:
        rounded = (to_uint8(images) / 255 for images in (self.image, self.original))
        size = "no bytes: numbers are not codes"
        if self.spec.kind != "latents":
            size = f"{payload_size(self.spec, self.length)} bytes"
        tokens = f"{self.length} of {self.spec.num_tokens} tokens"
        return f"{tokens}, {size}, PSNR {psnr(*rounded).item():.2f} dB"


@torch.inference_mode()
def reconstruct(model: Tokenizer, picture: Image.Image, length: int) -> Reconstruction:
    """Return what a picture's first `length` tokens show; raise `UserError` unless they decode."""
    model.spec.first(length)
    original = fitted(model, picture)
    image = decode_first(model, model.encode(original), length, 0, [0])
    return Reconstruction(original, image, model.spec, length)


def rectangle(spec: TokenSpec, top: int, left: int, bottom: int, right: int) -> Bool[Tensor, "n"]:
    """Return which tokens of a grid lie in rows [top, bottom) and columns [left, right); raise
    `UserError` where none does."""
    height, width = spec.shape
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise UserError(
            f"rows {top} to {bottom}, columns {left} to {right}: no part of {height}x{width} tokens"
        )
    return box(
        (height, width), top / height, left / width, bottom / height, right / width
    ).flatten()


def after(spec: TokenSpec, count: int) -> Bool[Tensor, "n"]:
    """Return which tokens follow the first `count` tokens of a sequence, or scales."""
    if spec.is_scales:
        count = sum(h * w for h, w in spec.shape[:count])
    return torch.arange(spec.num_tokens) >= count


@torch.inference_mode()
def mixed(
    model: Tokenizer, a: Image.Image, b: Image.Image, from_b: Bool[Tensor, "n"]
) -> Float[Tensor, "3 3 h w"]:
    """Return what a tokenizer makes of two pictures, and of a mix of their tokens."""
    of_a, of_b = model.encode(torch.cat([fitted(model, a), fitted(model, b)]))
    mask = from_b.view(*of_a.shape[: of_a.ndim - len(model.spec.value_shape)])
    mask = mask.view(*mask.shape, *[1] * len(model.spec.value_shape)).to(of_a.device)
    tokens = torch.stack([of_a, of_b, torch.where(mask, of_b, of_a)])
    return decode_first(model, tokens, model.spec.num_tokens, 0, [0, 0, 0])


def redraws(pipeline: ImagePipeline) -> bool:
    """Return whether a pipeline can decode a part of an image anew: whether it decodes the tokens
    themselves, at positions that are fixed."""
    generator, order = pipeline.generator, pipeline.decoding.plan
    masked = isinstance(generator.plan(order), MaskedPlan)
    adaptive = order is not None and order.adaptive_window
    return generator.decoded == generator.spec and not masked and not adaptive


def redrawn(
    pipeline: ImagePipeline,
    picture: Image.Image,
    redraw: Bool[Tensor, "n"],
    condition: Condition,
    seed: int,
) -> Iterator[Preview]:
    """Yield previews of a picture some of whose tokens the generator draws anew, given those that
    its plan has before them."""
    model = pipeline.tokenizer
    with torch.inference_mode():
        tokens = model.encode(fitted(model, picture))
    tokens = tokens.flatten(1, tokens.ndim - 1 - len(model.spec.value_shape))
    return stream(pipeline, condition, seed, given=Given(tokens, ~redraw.to(tokens.device)))
