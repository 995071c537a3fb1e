"""What every collection of labelled pictures offers, and how a picture file is read."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vistok.errors import UserError
from vistok.files import replaced

logger = logging.getLogger(__name__)

# The raster formats. Pillow's others include PostScript, which starts an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")
MAX_PIXELS = 2**26  # 8192 x 8192; a header can promise more memory than the machine has
MAX_ASPECT = 100  # resizing the short side of a longer strip would take gigabytes


class BrokenSampleError(UserError):
    """One sample that cannot be read: skipped and counted in training, an error in evaluation."""


@dataclass(frozen=True)
class Sample:
    """A picture (RGB; RGBA where a source keeps alpha), its class, a caption and a unique name.

    `key` comes from file or archive names: it is for messages, never a path to write to.
    """

    image: Image.Image
    label: int
    caption: str
    key: str


class ImageSource:
    """A finite collection of samples with random access.

    Attributes: `name`, for protocols and messages; `class_names`, in the order of the labels.
    """

    name: str
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Read sample `index`; raises `BrokenSampleError` where it cannot be decoded."""
        raise NotImplementedError

    def labels(self) -> Int64[Tensor, "n"]:
        """Return every label, without reading pictures."""
        raise NotImplementedError

    def permutation(self, generator: torch.Generator) -> Int64[Tensor, "n"]:
        """Return the order of one epoch."""
        return torch.randperm(len(self), generator=generator)


def read_image(file: Path | BufferedIOBase, name: str) -> Image.Image:
    """Decode a picture to 8-bit RGB.

    The EXIF orientation is applied, transparency is composed on white, 16-bit grey keeps its high
    byte, an animation gives its first frame, colour profiles are ignored. Raises
    `BrokenSampleError`, naming `name` and the reason, for what is damaged, no picture, larger than
    `MAX_PIXELS` or longer than `MAX_ASPECT` times its short side.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise BrokenSampleError(
            f"{name}: not a picture of a known format ({', '.join(FORMATS)})"
        ) from error
    except Exception as error:  # on damaged bytes the decoders raise almost any type
        raise BrokenSampleError(f"{name}: cannot be decoded ({error})") from error


def on_white(image: Image.Image) -> Image.Image:
    """Compose an RGBA picture on white."""
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} is more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} is longer than {MAX_ASPECT} times its short side")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError("32-bit samples have no known white level; save as 8 or 16 bits")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which makes nearly everything white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return on_white(image.convert("RGBA"))
    return image.convert("RGB")


def index_path(data: Path, directory: str | Path | None, suffix: str) -> Path:
    """Return where the index of `data` is kept: hidden beside it, or in `directory`."""
    data = data.resolve()
    if directory is None:
        return data.with_name(f".{data.name}.index{suffix}")
    return index_in(directory, str(data), suffix)


def index_in(directory: str | Path, data: str, suffix: str) -> Path:
    """Return where in `directory` the index of a path or URL is kept."""
    digest = hashlib.blake2b(data.encode("utf-8", "surrogateescape"), digest_size=6)
    return Path(directory) / f"{data.rsplit('/', 1)[-1]}-{digest.hexdigest()}.index{suffix}"


def keep_index(path: Path, write: Callable[[Path], None]) -> None:
    """Write an index file whole, or say that it stays in memory where the place is read-only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as aside:
            write(aside)
    except OSError as error:
        logger.info("index kept in memory only, pass index=DIRECTORY to save it: %s", error)
