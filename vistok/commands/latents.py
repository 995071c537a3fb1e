"""vistok latents: how large a tokenizer's latents are, and one whose latents have unit variance.

vistok latents --tokenizer runs/kl16 --data imagenet/train --count 50000
vistok latents --tokenizer runs/kl --data Emoji --output runs/kl-scaled
vistok latents --tokenizer runs/kl --data Emoji --per_channel true --output runs/kl-scaled
accelerate launch --num_processes 8 -m vistok.cli latents --tokenizer runs/kl16 --data train/
"""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from vistok.data import ImageSource, Transform, shard_range
from vistok.errors import UserError
from vistok.metrics import Pictures, open_pictures
from vistok.metrics.statistics import Moments, all_reduce
from vistok.quantizers import Gaussian
from vistok.quantizers.dimension_wise import frequency_sums
from vistok.tokenizers import KLTokenizer, QuantizedTokenizer


@torch.inference_mode()
def main(
    tokenizer: str,
    data: ImageSource | str,
    output: str | None = None,
    per_channel: bool = False,
    transform: str = "resize-center-crop",
    count: int | None = None,
    batch_size: int = 64,
    num_workers: int = 2,
) -> None:
    """Measure mean and deviation of the latents that a tokenizer draws, on one process or several.

    Generators of latents want unit variance: one over the deviation is the factor that does it. No
    latent is drawn: the variance of draws is that of their means and the mean of their variances.

    Args:
        tokenizer: directory or Hub repository of a tokenizer of continuous latents
        data: pictures to encode: a data set by name, a folder, tar shards or an npz
        output: directory for the tokenizer with these factors, for a KLTokenizer
        per_channel: scale each channel by its own deviation, less its mean
        transform: how a picture becomes the tokenizer's size
        count: pictures to take, spread evenly over the data; all by default
        batch_size: pictures encoded at once on each process
        num_workers: processes that load pictures, for each process
    """
    process = Accelerator()
    model = QuantizedTokenizer.from_pretrained(tokenizer).to(process.device).eval()
    if not isinstance(model.quantizer, Gaussian):
        raise UserError(f"{tokenizer}: makes {model.spec}, which are not drawn: nothing to scale")
    if output and not isinstance(model, KLTokenizer):
        raise UserError(f"--output: {type(model).__name__} has no factors, a KLTokenizer has")
    pictures = Pictures(open_pictures(data), Transform(transform, model.image_size[0]), count)
    mine = shard_range(len(pictures), process.process_index, process.num_processes)
    loader = DataLoader(Subset(pictures, mine), batch_size, num_workers=num_workers)

    means, variances, frequencies = measure(
        model, tqdm(loader, "encoding", disable=not process.is_main_process)
    )
    if not process.is_main_process:
        return

    mean, deviations = means.mean(), variances.sqrt()
    # Around the mean of all numbers, not around that of their channel.
    deviation = (variances + (means - mean).square()).mean().sqrt()
    print(f"{pictures}: {model.spec}")
    print(f"all channels  mean {mean:8.4f}  deviation {deviation:.4f}")
    for channel, numbers in enumerate(zip(means, deviations, strict=True)):
        print("channel {:<4}  mean {:8.4f}  deviation {:.4f}".format(channel, *numbers))
    if frequencies.isfinite().all():
        print(f"channels, those of low frequencies first: {frequencies.argsort().tolist()}")
    if not isinstance(model, KLTokenizer):
        return
    measured = (deviations.tolist(), means.tolist()) if per_channel else (deviation.item(),)
    scaled = model.rescaled(*measured)
    for name in ("scaling_factor", "shift_factor"):
        was, now = (each.vae.arguments[name] for each in (model, scaled))
        if now != was:
            print(f"{name}: {shown(was)} now, {shown(now)} for unit variance")
    if output:
        scaled.save_pretrained(output)
        print(f"written to {output}")


def measure(
    model: QuantizedTokenizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and, for grids, mean frequency of each channel over the pictures of all
    processes."""
    means = Moments(model.quantizer.dim, model.device)
    variances, frequencies = torch.zeros_like(means.sum), torch.zeros_like(means.outer[:2])
    for _, images in batches:
        statistics = model.statistics(images.to(model.device) / 255)
        mean, log_variance = model.quantizer.moments(statistics)
        means.update(mean.flatten(0, -2))
        variances += log_variance.double().exp().flatten(0, -2).sum(0)
        if mean.ndim == 4:
            frequencies += frequency_sums(mean)
    means.all_reduce()
    for sums in (variances, frequencies):
        all_reduce(sums)
    variances = means.covariance.diagonal() + variances / means.count
    return means.mean, variances, frequencies[0] / frequencies[1]


def shown(numbers: float | list[float]) -> str:
    if isinstance(numbers, list):
        return f"[{', '.join(map(shown, numbers))}]"
    return f"{numbers:.5g}"
