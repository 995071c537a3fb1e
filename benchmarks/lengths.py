"""Train tokenizers on the emoji with tail drop and without, and compare them at every length.

python benchmarks/lengths.py --output runs/lengths

Everything that is already there is kept: a run that was cut off goes on. Scores are of held-out
pictures; FID uses random features and compares with no published number.
"""

import csv
import sys
from pathlib import Path

from kept_runs import ROOT, call, train_tokenizer

from vistok.options import run
from vistok.tokenizers import Tokenizer

TAIL_DROP = {"with": "uniform(1,64,sample)", "without": "null"}
LENGTHS = "1,2,4,8,16,32,64"


def main(output: str = "runs/lengths", images: int | None = None) -> None:
    """Print the table of scores by length, and write a grid of pictures for each tokenizer.

    Args:
        output: directory of the models, the grids and the scores
        images: length of each training; that of the config by default
    """
    folder = Path(output)
    tables = {}
    for name, tail_drop in TAIL_DROP.items():
        model = folder / name
        options = ["--tokenizer.init_args.tail_drop", tail_drop]
        options += ["--images", images] if images else []
        train_tokenizer("retok_emoji", model, *options)
        # A tokenizer trained without tail drop refuses prefixes: here it is asked for them.
        forced = folder / f"{name}-any-length"
        Tokenizer.from_pretrained(model, tail_drop="uniform").save_pretrained(forced)
        call(sys.executable, ROOT / "sample/reconstruct.py", "--tokenizer", forced, "--count", 12,
             "--lengths", LENGTHS, "--features", "random",
             "--output", folder / f"{name}.png")  # fmt: skip
        with open(folder / f"{name}-curve.csv", newline="") as file:
            tables[name] = list(csv.DictReader(file))
    print("| tokens | bytes | PSNR with tail drop | without | rFID with | without |")
    print("|---|---|---|---|---|---|")
    for dropped, whole in zip(tables["with"], tables["without"], strict=True):
        scores = [f"{float(row[key]):.2f}" for key in ("psnr", "rfid") for row in (dropped, whole)]
        print(f"| {dropped['setting']} | {dropped['payload_bytes']} | {' | '.join(scores)} |")


if __name__ == "__main__":
    run(main)
