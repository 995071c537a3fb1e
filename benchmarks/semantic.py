"""Tokens of scales on the emoji: VAR and TokenFlow, what they draw, and what their tokens tell.

python benchmarks/semantic.py --output runs/semantic

Trains a small CLIP of pictures and names, TokenFlow's tokenizer from it, VAR's, and a generator for
each. Everything that is already there is kept: a run that was cut off goes on. FID uses random
features and compares with no published number; probes of classes do not depend on these.
"""

import statistics
import sys
from pathlib import Path

import torch
from kept_runs import (
    ROOT,
    call,
    opened,
    score,
    score_reconstruction,
    score_samples,
    timed,
    train_generator,
    train_tokenizer,
    vistok,
)

from vistok.decoding import Order
from vistok.images import image_grid
from vistok.options import run
from vistok.pipelines import ImagePipeline

# Arguments of the tokenizer of configs/tokenizers/tokenflow_emoji.yaml, to be made around a CLIP.
TOKENFLOW = {
    "scales": "[1,2,4,8]",
    "num_heads": 4,
    "vocab_size": 4096,
    "vq": "{revival: true}",
    "teacher_dim": 128,
    "semantic_depth": 2,
    "semantic_heads": 4,
    "channels": 96,
    "channel_multipliers": "[1]",
    "num_res_blocks": 1,
    "z_channels": 96,
    "attention": "false",
    "pixel_patch_size": 4,
}
TOKENIZERS = ("tokenflow", "var")
CONV = ROOT / "assets/emoji/tokenizer"
# Name of a row: the pair, and how it decodes other than by its config.
ROWS = {
    "VAR": ("var-pair", {}),
    "TokenFlow": ("tokenflow-pair", {"plan": Order("next_scale")}),
    "TokenFlow, corrected once": ("tokenflow-pair", {"plan": Order("next_scale(1)")}),
    "TokenFlow, corrected twice": ("tokenflow-pair", {"plan": Order("next_scale(2)")}),
}


def main(
    output: str = "runs/semantic",
    images: int | None = None,
    count: int = 432,
    batch: int = 36,
    repeats: int = 3,
    threads: int = 1,
) -> None:
    """Print the tables of reconstruction, of probes and of generation, and write samples.

    Args:
        output: directory of the models, the pictures and the scores
        images: length of each training; that of its config by default
        count: samples scored of each row
        batch: images at once when rates are taken
        repeats: timed rounds over the rows, of which the median counts
        threads: of the CPU when rates are taken
    """
    folder, length = Path(output), ["--images", images] if images else []
    scores = folder / "metrics.json"
    prepare(folder)
    for name in TOKENIZERS:
        train_pair(folder, name, length)

    print("| tokenizer | tokens | PSNR, dB | SSIM | rFID, random features |\n|---|---|---|---|---|")
    for name in TOKENIZERS:
        found = score_reconstruction(scores, name, folder / name)
        spec = ImagePipeline.from_pretrained(folder / f"{name}-pair").tokenizer.spec
        numbers = f"{found['psnr']:.2f} | {found['ssim']:.3f} | {found['rfid']:.2f}"
        print(f"| {name} | {spec.num_tokens} of {spec.vocab_size} | {numbers} |")

    print("\n| tokenizer | features | channels | accuracy | balanced accuracy | R@1 | mAP |")
    print("|---|---|---|---|---|---|---|")
    for name, tokenizer in {"conv (FSQ)": CONV, **{n: folder / n for n in TOKENIZERS}}.items():
        found = score(scores, f"{name}-probe", "--probe", "true", "--tokenizer", tokenizer,
                      "--data", "Emoji", "--data.split", "held-out", "--reference", "Emoji",
                      "--reference.split", "train")  # fmt: skip
        for features in ("tokens", "semantic", "pixel", "teacher"):
            if f"{features}/dim" in found:
                print(probe_row(name, features, found))
    for baseline in ("pixels", "majority", "chance"):
        print(probe_row("", baseline, found))

    torch.set_num_threads(threads)
    pipelines = {name: opened(folder / pair, new) for name, (pair, new) in ROWS.items()}
    rates = {name: [] for name in ROWS}
    for _ in range(repeats + 1):  # the first round is not counted
        for name, pipeline in pipelines.items():
            rates[name].append(batch / timed(pipeline, batch))
    print(f"\nbatch {batch}, {threads} thread(s), CPU time; tokens alone, without the decoder")
    print("| model | passes | images/s | FID, random features |\n|---|---|---|---|")
    for name, (pair, changes) in ROWS.items():
        options = [part for key, value in changes.items() for part in (f"--{key}", value)]
        fid = score_samples(scores, name, folder / pair, count, *options)
        passes = len(pipelines[name].decoding.plan_of(pipelines[name].generator))
        print(f"| {name} | {passes} | {statistics.median(rates[name][1:]):.1f} | {fid:.1f} |")
    classes = torch.arange(18) % 9
    drawn = [pipeline.sample(classes, 0, range(18)) for pipeline in pipelines.values()]
    image_grid(torch.cat(drawn), 18, list(pipelines)).save(folder / "samples.png")


def probe_row(name: str, features: str, found: dict[str, float]) -> str:
    """Return a row in %, without what these features have no score of."""
    columns = ("accuracy", "balanced_accuracy", "R@1", "mAP")
    scores = (found.get(f"{features}/{column}") for column in columns)
    numbers = ["" if score is None else f"{100 * score:.1f}" for score in scores]
    dim = found.get(f"{features}/dim")
    cells = (name, features, "" if dim is None else f"{dim:.0f}", *numbers)
    return f"| {' | '.join(cells)} |"


def prepare(folder: Path) -> None:
    """Train the CLIP, and make around it the tokenizer that TokenFlow's training starts from."""
    clip, start = folder / "clip", folder / "initial"
    if not clip.exists():
        call(sys.executable, ROOT / "benchmarks/emoji_clip.py", "--output", clip)
    if not start.exists():
        options = [part for k, v in TOKENFLOW.items() for part in (f"--options.{k}", v)]
        vistok("import", "tokenflow", clip / "model.safetensors", "--output", start, *options)


def train_pair(folder: Path, name: str, length: list[object]) -> None:
    """Train a tokenizer, and a generator of its tokens."""
    options = [*length]
    if name == "tokenflow":
        options += ["--initial", folder / "initial/tokenizer"]
        options += ["--loss.teacher.init_args.path", folder / "clip"]
    train_tokenizer(f"{name}_emoji", folder / name, *options)
    train_generator(f"{name}_emoji", folder / f"{name}-pair", folder / name, *length)


if __name__ == "__main__":
    run(main)
