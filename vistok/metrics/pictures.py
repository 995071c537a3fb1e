"""Pictures to score or compare with, from any source, folder, tar or npz, as bytes of one size."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vistok.data import Emoji, ImageFolder, ImageSource, Sample, TarShards, Transform, to_uint8
from vistok.data.transforms import to_float
from vistok.errors import UserError, suggestion
from vistok.metrics.statistics import read_npz


class NpzImages(ImageSource):
    """The images of an ADM npz, `arr_0` as uint8 (N, H, W, 3), held in memory as one class. Raises
    `UserError` for a file of anything else."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.name
        self.class_names = (self.name,)
        self.images = read_npz(path, {"arr_0"}).get("arr_0", np.zeros(0))
        if self.images.dtype != np.uint8 or self.images.shape[3:] != (3,) or not self.images.size:
            raise UserError(
                f"{path}: arr_0 is {self.images.dtype} {self.images.shape}, expected images as "
                "uint8 (N, H, W, 3)"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = Image.fromarray(self.images[index])
        return Sample(image, 0, self.name, f"{self.path}[{index}]")

    def labels(self) -> Int64[Tensor, "n"]:
        return torch.zeros(len(self), dtype=torch.int64)


def open_pictures(where: ImageSource | str) -> ImageSource:
    """Return the source itself, or that of a path to a folder, tar shards or npz."""
    if isinstance(where, ImageSource):
        return where
    if where.endswith(".npz"):
        return NpzImages(where)
    if where.endswith(".tar"):
        return TarShards(where)
    if Path(where).is_dir():
        return ImageFolder(where)
    names = [source.__name__ for source in (Emoji, ImageFolder, TarShards)]
    raise UserError(
        f"pictures '{where}': neither a folder, nor *.tar, nor *.npz, nor one of "
        f"{', '.join(names)}{suggestion(where, names)}"
    )


class Pictures(Dataset):
    """The pictures of a source as a protocol shows them to a metric.

    Item i is (index, uint8 (3, H, W)). Without a transform pictures are taken as they are and must
    share the size of the first. `count` takes that many, spread evenly over the source. Raises
    `UserError` for a picture that cannot be read or has another size.
    """

    def __init__(
        self, source: ImageSource, transform: Transform | None = None, count: int | None = None
    ):
        if transform is not None and transform.is_random:
            raise UserError(f"transform '{transform.name}' is random: scores need a fixed one")
        if count is not None and not 1 <= count <= len(source):
            raise UserError(f"{source.name} has {len(source)} pictures, asked for {count}")
        self.source = source
        self.transform = transform
        self.count = count or len(source)
        self.size = (transform.size, transform.size) if transform else _size(source[0])

    def __len__(self) -> int:
        return self.count

    def labels(self) -> Int64[Tensor, "n"]:
        """Return the class of each picture, without reading it."""
        return self.source.labels()[torch.arange(self.count) * len(self.source) // self.count]

    def class_names(self, indices: Int64[Tensor, "b"]) -> list[str]:
        """Return the names of the classes of some pictures."""
        return [self.source.class_names[label] for label in self.labels()[indices.cpu()]]

    def __getitem__(self, index: int) -> tuple[int, UInt8[Tensor, "3 h w"]]:
        sample = self.source[index * len(self.source) // self.count]
        if sample.image.mode != "RGB":
            raise UserError(
                f"{sample.key}: scores are of RGB pictures, this is {sample.image.mode}"
            )
        if self.transform is None and _size(sample) != self.size:
            (h, w), (height, width) = _size(sample), self.size
            raise UserError(
                f"{sample.key} is {w} x {h} and the first picture {width} x {height}: give --size"
            )
        return index, to_uint8((self.transform or to_float)(sample.image))

    @property
    def presentation(self) -> str:
        """How the pictures come to their size."""
        return str(self.transform or f"as they are, {self.size[1]} x {self.size[0]}")

    def __str__(self) -> str:
        of = "" if self.count == len(self.source) else f" of {len(self.source)}"
        return f"{self.source.name}, {self.count}{of} pictures, {self.presentation}"


def _size(sample: Sample) -> tuple[int, int]:
    return sample.image.height, sample.image.width
