"""vistok rate-distortion: a tokenizer as an image codec, beside JPEG and WebP.

vistok rate-distortion DIR --tokenizer DIR -o runs/rate-distortion
vistok rate-distortion Emoji --tokenizer DIR --lengths 1,2,4,8 --features random
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vistok import metrics as m
from vistok.codec import Codec
from vistok.curves import (
    FormatCurve,
    Point,
    Scoring,
    TokenizerCurve,
    measure,
    plot,
    read_lengths,
    write_results,
    write_table,
)
from vistok.data import ImageSource, Transform
from vistok.errors import UserError
from vistok.tokenizers import Tokenizer


def main(
    data: ImageSource | str,
    tokenizer: str,
    output: str = "runs/rate-distortion",
    lengths: list[int] | str | None = None,
    transform: str = "resize-center-crop",
    count: int | None = None,
    features: str | None = None,
    feature_weights: str | None = None,
    lpips_weights: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> None:
    """Measure quality against the size of files, for a tokenizer's lengths and for JPEG and WebP.

    All code the same pictures at the tokenizer's size; sizes are means of whole files, headers
    included, which for small pictures are most of a JPEG. Writes curve.csv, matched.csv (each of
    the tokenizer's sizes beside the best of either format that is as small), curve.png, and
    metrics.json, where every score stands with its protocol.

    Args:
        data: pictures: a data set by name, a folder, tar shards or an npz
        tokenizer: directory or Hub repository of the tokenizer
        output: directory to write to
        lengths: tokens to keep, as 1,2,4,8; by default the powers of two and all
        transform: how a picture becomes the tokenizer's size
        count: pictures to take, spread evenly over the data; all by default
        features: of rFID: inception, random (offline; no published numbers), ... or none; by
            default inception where its weights are at hand
        feature_weights: local file of the feature network's weights
        lpips_weights: local file of torchvision's VGG-16; LPIPS is left out where there is none
        batch_size: pictures at once on each process
        num_workers: processes that read pictures, for each process
        seed: of decoders that draw; a picture's noise is the same at every length
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size} must be at least 1")
    accelerator = Accelerator()
    model = Tokenizer.from_pretrained(tokenizer).to(accelerator.device).eval()
    Codec(model)  # raises for what makes no files
    kept = read_lengths(lengths, model.spec)
    pictures = m.Pictures(m.open_pictures(data), Transform(transform, model.image_size[0]), count)
    weights = feature_weights, lpips_weights
    scoring = Scoring.load(pictures, features, *weights, accelerator.device)
    ours = TokenizerCurve(scoring, model, kept, seed)
    others = [FormatCurve(scoring, name) for name in FormatCurve.OPTIONS]
    points = measure(accelerator, scoring, [ours, *others], batch_size, num_workers)
    if not accelerator.is_main_process:
        return
    folder = Path(output)
    write_table(folder / "curve.csv", [point.row() for point in points])
    write_table(folder / "matched.csv", side_by_side(points, ours.codec))
    write_results(folder / "metrics.json", scoring.protocol, points)
    plot(folder / "curve.png", points, "bytes", str(pictures))
    print(f"{pictures}; features of rFID: {scoring.protocol.features}")
    for point in points:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in point.scores.items())
        print(f"{point.codec:16} {point.setting:4} {point.bytes:10.1f} bytes  {scores}")
    print(f"written to {folder}")


def side_by_side(points: Sequence[Point], codec: str) -> list[dict[str, Any]]:
    """Return a row for each point of `codec`, with the point of each other codec that comes nearest
    to its size without exceeding it; empty where none is as small."""
    rows = [p.row() for p in points if p.codec == codec]
    for name in dict.fromkeys(p.codec for p in points if p.codec != codec):
        others = [p for p in points if p.codec == name]
        for row in rows:
            fitting = [p for p in others if p.bytes <= row["bytes"]]
            best = max(fitting, key=lambda p: p.bytes, default=None)
            for key in ("setting", "bytes", *others[0].scores):
                row[f"{name}_{key}"] = best.row()[key] if best else ""
    return rows
