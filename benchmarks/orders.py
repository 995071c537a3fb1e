"""Train generators alike on the emoji and compare how fast and how well each order decodes.

python benchmarks/orders.py --output runs/orders

Everything that is already there is kept: a run that was cut off goes on. Rates are taken in turn,
in one process; FID uses random features and compares with no published number.
"""

import shutil
import statistics
import time
from pathlib import Path

import torch
from kept_runs import ROOT, opened, score_samples, train_generator
from torch import Tensor

from vistok.decoding import Order
from vistok.images import image_grid
from vistok.options import run
from vistok.pipelines import ImagePipeline

TOKENIZER = ROOT / "assets/emoji/tokenizer"
# Name of a row: the trained model, and the order of decoding if it is not that of training.
ROWS = {
    "raster": ("raster", None),
    "ZipAR, window 4": ("raster", "zipar(4)"),
    "ZipAR, window 2": ("raster", "zipar(2)"),
    "PAR, 4 regions": ("par", None),
    "NAR": ("nar", None),
    "MaskGIT, 8 passes": ("maskgit", None),
    "RAR": ("rar", None),
}


def main(
    output: str = "runs/orders",
    count: int = 432,
    batch: int = 36,
    repeats: int = 3,
    threads: int = 1,
) -> None:
    """Print the table of passes, rates and scores, and write a grid of samples for each row.

    Args:
        output: directory of the token cache, the models, the grids and the scores
        count: samples scored of each row
        batch: images at once when rates are taken
        repeats: timed rounds over the rows, of which the median counts
        threads: of the CPU when rates are taken
    """
    folder = Path(output)
    tokenizer = folder / "tokenizer"
    shutil.copytree(TOKENIZER, tokenizer, dirs_exist_ok=True)
    for model in dict.fromkeys(model for model, _ in ROWS.values()):
        train_generator(f"{model}_emoji", folder / model, tokenizer)

    torch.set_num_threads(threads)
    pipelines = {
        name: opened(folder / model, {"plan": order and Order(order)})
        for name, (model, order) in ROWS.items()
    }
    seconds = {name: [] for name in ROWS}
    for _ in range(repeats + 1):  # the first round is not counted
        for name, pipeline in pipelines.items():
            began = time.perf_counter()
            tokens = sample(pipeline, batch)
            seconds[name].append(time.perf_counter() - began)
            pictures = pipeline.tokenizer.decode(tokens)
            grid = image_grid(order_by_class(pictures, pipeline), 4, list(pipeline.class_names))
            grid.save(folder / f"{name.split(',')[0].lower()}-{len(plan_of(pipeline))}.png")
    print(f"batch {batch}, {threads} CPU thread(s); tokens alone, without the tokenizer's decoder")
    print("| order | passes | images/s | FID, random features |\n|---|---|---|---|")
    for name, pipeline in pipelines.items():
        rate = batch / statistics.median(seconds[name][1:])
        model, order = ROWS[name]
        plan = ["--plan", order] if order else []
        fid = score_samples(folder / "metrics.json", name, folder / model, count, *plan)
        print(f"| {name} | {len(plan_of(pipeline))} | {rate:.1f} | {fid:.1f} |")


def plan_of(pipeline: ImagePipeline):
    return pipeline.generator.plan(pipeline.decoding.plan)


def sample(pipeline: ImagePipeline, batch: int) -> Tensor:
    """Return the tokens of the classes in turn."""
    labels = torch.arange(batch) % len(pipeline.class_names)
    return pipeline.sample_tokens(labels, 0, range(batch))


def order_by_class(pictures: Tensor, pipeline: ImagePipeline) -> Tensor:
    """Return the first four of each class side by side."""
    classes = len(pipeline.class_names)
    return pictures[: 4 * classes].unflatten(0, (-1, classes)).transpose(0, 1).flatten(0, 1)


if __name__ == "__main__":
    run(main)
