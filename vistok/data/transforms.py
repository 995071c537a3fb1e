"""Picture to tensor by named protocol; the name stands in token caches and beside every score."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from vistok.errors import UserError, suggestion

BICUBIC, BOX = Image.Resampling.BICUBIC, Image.Resampling.BOX


def to_uint8(images: Float[Tensor, "*batch c h w"]) -> UInt8[Tensor, "*batch c h w"]:
    """Round images in [0, 1] to bytes, clamping what lies outside: the one place that does."""
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)


def to_float(image: Image.Image) -> Float[Tensor, "c h w"]:
    """Return a picture as a tensor in [0, 1]; `to_uint8` inverts it exactly."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format) / 255


def adm_resize(image: Image.Image, short: int) -> Image.Image:
    """Bring the short side to `short`: halve by box averages while it is at least twice that, then
    bicubic (Dhariwal & Nichol, 2021, "Diffusion models beat GANs", their data loader)."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), BOX)
    scale = short / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), BICUBIC)


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """`adm_resize`, then the centre at offset (side - size) // 2."""
    image = adm_resize(image, size)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def resize_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Antialiased bicubic to a short side of `size`, then the centre: torchvision's Resize and
    CenterCrop on PIL pictures, whose long side is truncated and whose offset is rounded."""
    short = min(image.size)
    image = image.resize((size * image.width // short, size * image.height // short), BICUBIC)
    return _crop(image, round((image.width - size) / 2), round((image.height - size) / 2), size)


def random_crop(image: Image.Image, size: int, generator: torch.Generator) -> Image.Image:
    """`adm_resize` to a short side drawn from [size, 1.25 size], then a crop anywhere."""
    image = adm_resize(image, _draw(size, ceil(1.25 * size), generator))
    left = _draw(0, image.width - size, generator)
    top = _draw(0, image.height - size, generator)
    return _crop(image, left, top, size)


def ten_crop(image: Image.Image, size: int, margin: float) -> list[Image.Image]:
    """`adm_center_crop` to `margin` times the size, of which four corners and the centre, whose
    offset is rounded half to even; then the same five of its mirror image."""
    image = adm_center_crop(image, int(size * margin))
    end = image.width - size
    middle = round(end / 2)
    corners = ((0, 0), (end, 0), (0, end), (end, end), (middle, middle))
    return [
        _crop(side, left, top, size)
        for side in (image, ImageOps.mirror(image))
        for left, top in corners
    ]


def center_crop_flips(image: Image.Image, size: int) -> list[Image.Image]:
    """`adm_center_crop` and its mirror image."""
    image = adm_center_crop(image, size)
    return [image, ImageOps.mirror(image)]


@dataclass(frozen=True)
class Protocol:
    """`crop(image, size)` makes one picture, or a list of `count`; a random one takes a generator
    too. `mirrors`: half of the results are mirrored."""

    crop: Callable[..., Image.Image | list[Image.Image]]
    count: int = 1
    is_random: bool = False
    mirrors: bool = False


PROTOCOLS = {
    "adm-center-crop": Protocol(adm_center_crop),
    "resize-center-crop": Protocol(resize_center_crop),
    "random-crop-flip": Protocol(random_crop, is_random=True, mirrors=True),
    "random-flip": Protocol(resize_center_crop, mirrors=True),
    "adm-center-crop-flips": Protocol(center_crop_flips, count=2),
    "ten-crop": Protocol(partial(ten_crop, margin=1.1), count=10),
    "ten-crop-105": Protocol(partial(ten_crop, margin=1.05), count=10),
}


@dataclass(frozen=True)
class Transform:
    """A square crop of `size` pixels by protocol `name`:

    - `adm-center-crop`: box halvings, bicubic, centre; the protocol of ImageNet generators;
    - `resize-center-crop`: antialiased bicubic, centre; torchvision's;
    - `random-crop-flip`: short side from [size, 1.25 size], crop anywhere, mirrored by half;
    - `random-flip`: `resize-center-crop`, mirrored by half;
    - `adm-center-crop-flips`: one of two, `adm-center-crop` and its mirror image;
    - `ten-crop`: one of ten, corners and centre of `adm-center-crop` at 1.1 times the size, and
      the same of its mirror image, as LlamaGen trains on; `ten-crop-105`: at 1.05 times.

    All but the first two draw from the generator passed to the call and from nothing else.
    """

    name: str
    size: int

    def __post_init__(self):
        if self.name not in PROTOCOLS:
            raise UserError(
                f"transform '{self.name}' is none of {', '.join(PROTOCOLS)}"
                f"{suggestion(self.name, PROTOCOLS)}"
            )
        if self.size < 1:
            raise UserError(f"transform '{self.name}': size {self.size} must be at least 1 pixel")

    @property
    def count(self) -> int | None:
        """How many crops a picture has; None where they are drawn without number."""
        protocol = PROTOCOLS[self.name]
        return None if protocol.is_random or protocol.mirrors else protocol.count

    @property
    def is_random(self) -> bool:
        return self.count != 1

    def __call__(
        self, image: Image.Image, generator: torch.Generator | None = None
    ) -> Float[Tensor, "c h w"]:
        """Return the crop in [0, 1]: 3 channels, or 4 for a picture with alpha."""
        if self.is_random and generator is None:
            raise UserError(f"transform '{self.name}' is random: pass it a torch.Generator")
        protocol = PROTOCOLS[self.name]
        arguments = (generator,) if protocol.is_random else ()
        crop = protocol.crop(image, self.size, *arguments)
        if protocol.count > 1:
            crop = crop[_draw(0, protocol.count - 1, generator)]
        pixels = to_float(crop)
        if protocol.mirrors and _draw(0, 1, generator):
            pixels = pixels.flip(-1)
        return pixels

    def all_crops(self, image: Image.Image) -> Float[Tensor, "n c h w"]:
        """Return the `count` crops of a picture, in the order of the protocol."""
        protocol = PROTOCOLS[self.name]
        crops = protocol.crop(image, self.size)
        return torch.stack([to_float(c) for c in (crops if protocol.count > 1 else [crops])])

    def __str__(self) -> str:
        return f"{self.name} at {self.size} px"


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    """Draw an integer from [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))
