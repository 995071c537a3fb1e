"""Continuous tokens on the emoji: what TokenBridge's digits cost, and what annealed steps save.

python benchmarks/continuous.py --output runs/continuous

Trains a KL autoencoder and, on its latents, MAR, xAR, FlowAR and TokenBridge. Everything that is
already there is kept: a run that was cut off goes on. Rates are taken in turn, in one process; FID
uses random features and compares with no published number.
"""

import statistics
from pathlib import Path

import torch
from kept_runs import (
    opened,
    score_reconstruction,
    score_samples,
    timed,
    train_generator,
    train_tokenizer,
    vistok,
)

from vistok.decoding import Sampler, Schedule
from vistok.images import image_grid
from vistok.options import run
from vistok.pipelines import ImagePipeline
from vistok.speed import cost

LEVELS = (8, 16, 32, 64)  # of digits, as in TokenBridge's table 1
TOKENIZERS = {"mar": "kl", "xar": "kl", "flowar": "kl", "tokenbridge": "bridge-64"}
# Name of a row: the model, and how it decodes other than by its config.
ROWS = {
    "MAR, 50 steps": ("mar", {}),
    "MAR, DiSA 50 to 5": ("mar", {"steps": Schedule("linear(50,5)")}),
    "MAR, 27 steps": ("mar", {"steps": Schedule(27)}),
    "MAR, 5 to 50 steps": ("mar", {"steps": Schedule("linear(5,50)")}),
    "MAR, 5 steps": ("mar", {"steps": Schedule(5)}),
    "MAR from the very noise": ("mar", {"sampler": Sampler("ddpm")}),
    "xAR, 25 steps": ("xar", {}),
    "xAR, DiSA 25 to 8": ("xar", {"steps": Schedule("linear(25,8)")}),
    "xAR, 16 steps": ("xar", {"steps": Schedule(16)}),
    "xAR, 8 steps": ("xar", {"steps": Schedule(8)}),
    "FlowAR, 25 steps": ("flowar", {}),
    "FlowAR, DiSA 25 to 15": ("flowar", {"steps": Schedule("linear(25,15)")}),
    "TokenBridge": ("tokenbridge", {}),
}


def main(
    output: str = "runs/continuous",
    images: int | None = None,
    count: int = 432,
    batch: int = 36,
    repeats: int = 3,
    threads: int = 1,
) -> None:
    """Print the tables of reconstruction and generation, and write samples of each row.

    Args:
        output: directory of the models, the pictures and the scores
        images: length of each training; that of its config by default
        count: samples scored of each row
        batch: images at once when rates are taken
        repeats: timed rounds over the rows, of which the median counts
        threads: of the CPU when rates are taken
    """
    folder = Path(output)
    scores = folder / "metrics.json"
    length = ["--images", images] if images else []
    train_tokenizers(folder, length)
    for model, tokenizer in TOKENIZERS.items():
        train_generator(f"{model}_emoji", folder / model, folder / tokenizer, *length)

    print("| tokens | PSNR, dB | SSIM | rFID, random features |\n|---|---|---|---|")
    for name in ("kl", *(f"bridge-{levels}" for levels in LEVELS)):
        found = score_reconstruction(scores, name, folder / name)
        label = "continuous" if name == "kl" else f"{name.split('-')[1]} levels"
        print(f"| {label} | {found['psnr']:.2f} | {found['ssim']:.3f} | {found['rfid']:.2f} |")

    torch.set_num_threads(threads)
    pipelines = {name: opened(folder / model, new) for name, (model, new) in ROWS.items()}
    rates = {name: [] for name in ROWS}
    for _ in range(repeats + 1):  # the first round is not counted
        for name, pipeline in pipelines.items():
            rates[name].append(batch / timed(pipeline, batch))
    print(f"\nbatch {batch}, {threads} thread(s), CPU time; tokens alone, without the decoder")
    print("| model | passes | network calls | tokens x calls | images/s | FID, random features |")
    print("|---|---|---|---|---|---|")
    for name, pipeline in pipelines.items():
        spent = cost(pipeline.generator, pipeline.decoding)
        model, changes = ROWS[name]
        options = [part for k, v in changes.items() for part in (f"--{k}", v)]
        fid = score_samples(scores, name, folder / model, count, *options)
        rate = statistics.median(rates[name][1:])
        print(
            f"| {name} | {spent.passes} | {spent.calls} | {spent.rows} | {rate:.1f} | {fid:.1f} |"
        )
    draw(folder / "samples.png", pipelines)


def train_tokenizers(folder: Path, length: list[object]) -> None:
    """Train the autoencoder, scale its latents to a deviation of one, and cut them into digits."""
    train_tokenizer("kl_emoji", folder / "vae", *length)
    if not (folder / "kl").exists():
        vistok("latents", "--tokenizer", folder / "vae", "--data", "Emoji",
               "--data.split", "train", "--output", folder / "kl")  # fmt: skip
    for levels in LEVELS:
        if not (folder / f"bridge-{levels}").exists():
            vistok("quantize", "--tokenizer", folder / "kl", "--levels", levels,
                   "--output", folder / f"bridge-{levels}")  # fmt: skip


def draw(file: Path, pipelines: dict[str, ImagePipeline]) -> None:
    """Write the same numbers of the same classes by each row, one under another."""
    classes = torch.arange(18) % 9
    rows = [pipeline.sample(classes, 0, range(18)) for pipeline in pipelines.values()]
    image_grid(torch.cat(rows), 18, list(pipelines)).save(file)


if __name__ == "__main__":
    run(main)
