"""vistok stats: the statistics of a data set, which samples are compared with again and again.

vistok stats --data Emoji --size 32 --features random --output runs/emoji.npz
vistok stats imagenet/train --size 256 --transform adm-center-crop --output runs/imagenet-256.npz
accelerate launch --num_processes 8 -m vistok.cli stats --data samples.npz --output runs/samples.npz
"""

from pathlib import Path

from accelerate import Accelerator

from vistok import metrics as m
from vistok.data import ImageSource, Transform
from vistok.errors import UserError
from vistok.evaluation import Collection, Scan


def main(
    data: ImageSource | str,
    output: str,
    features: str = "inception",
    feature_weights: str | None = None,
    transform: str = "resize-center-crop",
    size: int | None = None,
    count: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> None:
    """Write mean and covariance of the features of pictures, as ADM's evaluator reads them: what
    `vistok evaluate --reference` takes in place of the pictures.

    Args:
        data: pictures: a data set by name, a folder, tar shards or an npz
        output: npz file to write
        features: inception, dinov2-..., clip-..., or random (offline; no published numbers)
        feature_weights: local file of the feature network's weights
        transform: how a picture becomes the size
        size: side in pixels; by default that of the pictures as they are
        count: pictures to take, spread evenly over the data; all by default
        batch_size: pictures at once on each process
        num_workers: processes that read pictures, for each process
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size} must be at least 1")
    if Path(output).suffix != ".npz":
        raise UserError(f"--output {output}: statistics are written as .npz")
    accelerator = Accelerator()
    crop = None if size is None else Transform(transform, size)
    pictures = m.Pictures(m.open_pictures(data), crop, count)
    if len(pictures) < 2:
        raise UserError(f"{pictures}: a covariance takes at least 2 pictures")
    network = m.load_features(features, feature_weights).to(accelerator.device)
    scan = Scan(accelerator, batch_size, num_workers)
    statistics = scan.statistics(Collection(pictures), network)
    if accelerator.is_main_process:
        statistics.save(output)
        print(f"statistics of {pictures}, {network.label}: {output}")
