"""vistok reconstruct: pictures above what a tokenizer makes of them, at one length or at several.

vistok reconstruct --tokenizer assets/emoji/tokenizer --output reconstructions.png
vistok reconstruct --tokenizer DIR --lengths 1,2,4,8,16 --features random
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from vistok import metrics as m
from vistok.codec import payload_size
from vistok.curves import (
    Scoring,
    TokenizerCurve,
    decode_first,
    measure,
    plot,
    read_lengths,
    write_results,
    write_table,
)
from vistok.data import Emoji, EvaluationImages, ImageSource, Transform
from vistok.errors import UserError
from vistok.files import replaced
from vistok.images import image_grid
from vistok.tokenizers import Tokenizer


def main(
    tokenizer: str,
    output: str = "runs/reconstructions.png",
    data: ImageSource | str | None = None,
    transform: str = "resize-center-crop",
    count: int = 48,
    columns: int = 12,
    lengths: list[int] | str | None = None,
    curve_images: int | None = None,
    features: str | None = None,
    feature_weights: str | None = None,
    lpips_weights: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> None:
    """Write a grid in which each row of pictures stands above its reconstructions.

    With --lengths there is a row for each length, and scores against the length go into a table,
    a plot and a file of results beside the grid: NAME-curve.csv, NAME-curve.png, NAME-curve.json.

    Args:
        tokenizer: directory or Hub repository of the tokenizer
        output: PNG file to write
        data: pictures: a data set by name, a folder, tar shards or an npz; the held-out emoji by
            default
        transform: how a picture becomes the tokenizer's size
        count: number of pictures, spread evenly over the data
        columns: pictures in a row
        lengths: tokens to decode from, as 1,2,4,8, of a tokenizer that is ordered
        curve_images: pictures that the scores are of, spread evenly; all by default
        features: of rFID: inception, random (offline; no published numbers), ... or none; by
            default inception where its weights are at hand
        feature_weights: local file of the feature network's weights
        lpips_weights: local file of torchvision's VGG-16; LPIPS is left out where there is none
        batch_size: pictures scored at once on each process
        num_workers: processes that read pictures, for each process
        seed: of decoders that draw; a picture's noise is the same at every length
    """
    data = Emoji("held-out") if data is None else m.open_pictures(data)
    accelerator = Accelerator()
    model = Tokenizer.from_pretrained(tokenizer).to(accelerator.device).eval()
    if len(data) < 1 or not 1 <= columns <= count:
        raise UserError(f"--count {count} must be at least --columns {columns}, and data not empty")
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size} must be at least 1")
    crop = Transform(transform, model.image_size[0])
    if lengths is not None:
        kept = read_lengths(lengths, model.spec)
        pictures = m.Pictures(data, crop, curve_images)
        weights = feature_weights, lpips_weights
        scoring = Scoring.load(pictures, features, *weights, accelerator.device)
        curves = [TokenizerCurve(scoring, model, kept, seed)]
        points = measure(accelerator, scoring, curves, batch_size, num_workers)
    if not accelerator.is_main_process:
        return

    images = EvaluationImages(data, crop)
    chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist()
    originals = torch.stack([images[i]["image"] for i in chosen])
    shown = [model.spec.num_tokens] if lengths is None else kept
    made = reconstructions(model, originals, shown, seed, chosen)
    titles = ["original", *(title(model, length) for length in shown)]
    # White pictures fill the last rows up, so that every row begins with a picture of its own.
    blank = originals.new_ones(-len(originals) % columns, *originals.shape[1:])
    filled = [torch.cat([pictures, blank]).split(columns) for pictures in (originals, *made)]
    rows = [row for block in zip(*filled, strict=True) for row in block]
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as aside:
        scale = max(1, 64 // model.image_size[1])
        labels = titles * (len(rows) // len(titles))
        image_grid(torch.cat(rows), columns, labels, scale).save(aside, "PNG")
    print(f"{len(originals)} pictures of {data.name} as {model.spec}: {output}")
    if lengths is not None:
        stem = path.with_suffix("")
        write_table(Path(f"{stem}-curve.csv"), [point.row() for point in points])
        write_results(Path(f"{stem}-curve.json"), scoring.protocol, points)
        plot(Path(f"{stem}-curve.png"), points, "tokens", str(pictures))
        print(f"scores of {pictures} by length: {stem}-curve.csv")


@torch.inference_mode()
def reconstructions(
    model: Tokenizer, originals: Tensor, lengths: list[int], seed: int, indices: list[int]
) -> list[Tensor]:
    """Return what a tokenizer makes of pictures, which it encodes once, at each length."""
    tokens = model.encode(originals.to(model.device))
    return [decode_first(model, tokens, length, seed, indices).cpu() for length in lengths]


def title(model: Tokenizer, length: int) -> str:
    """Return a row's label: tokens and their bytes."""
    if model.spec.kind == "latents":
        return f"{length} latents"
    tokens = "1 token" if length == 1 else f"{length} tokens"
    return f"{tokens}, {payload_size(model.spec, length)} bytes"
