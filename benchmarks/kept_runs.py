"""What benchmarks on the emoji share: commands whose results are kept, so that a run goes on where
it was cut off."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from vistok.pipelines import ImagePipeline

ROOT = Path(__file__).parents[1]


def call(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True)


def vistok(*arguments: object) -> None:
    call(sys.executable, "-m", "vistok.cli", *arguments)


def train_tokenizer(config: str, output: Path, *options: object) -> None:
    """Train by a config of the tokenizers, or go on."""
    call("accelerate", "launch", ROOT / "train/tokenizer.py", "--config",
         ROOT / f"configs/tokenizers/{config}.yaml", *options, "--output", output,
         "--resume", "true")  # fmt: skip


def train_generator(config: str, output: Path, tokenizer: Path, *options: object) -> None:
    """Train by a config of the generators, or go on, on a cache of the tokens of the training
    split, kept beside the tokenizer; `output` becomes a pair."""
    tokens = tokenizer.with_name(f"{tokenizer.name}-tokens")
    vistok("cache", "--tokenizer", tokenizer, "--data", "Emoji",
           "--data.split", "train", "--output", tokens)  # fmt: skip
    call("accelerate", "launch", ROOT / "train/generator.py", "--config",
         ROOT / f"configs/generators/{config}.yaml", *options, "--tokenizer", tokenizer,
         "--tokens", tokens, "--output", output / "generator", "--resume", "true")  # fmt: skip
    shutil.copytree(tokenizer, output / "tokenizer", dirs_exist_ok=True)


def score(scores: Path, name: str, *options: object) -> dict[str, float]:
    """Return the scores by that name, which random features make offline; taken now unless they
    are there."""
    done = json.loads(scores.read_text()) if scores.exists() else {}
    if name not in done:
        call(sys.executable, ROOT / "sample/evaluate.py", *options, "--features", "random",
             "--name", name, "--output", scores)  # fmt: skip
        done = json.loads(scores.read_text())
    return done[name]["scores"]


def score_reconstruction(scores: Path, name: str, tokenizer: Path) -> dict[str, float]:
    """Return PSNR, SSIM and rFID of the held-out pictures."""
    return score(scores, name, "--tokenizer", tokenizer, "--data", "Emoji",
                 "--data.split", "held-out", "--metrics", '["fid", "psnr", "ssim"]')  # fmt: skip


def score_samples(scores: Path, name: str, pair: Path, count: int, *options: object) -> float:
    """Return the FID of samples against the held-out pictures."""
    found = score(scores, name, "--checkpoint", pair, *options, "--reference", "Emoji",
                  "--reference.split", "held-out", "--count", count,
                  "--metrics", '["fid"]')  # fmt: skip
    return found["fid"]


def opened(pair: Path, changes: dict[str, object]) -> ImagePipeline:
    pipeline = ImagePipeline.from_pretrained(pair)
    pipeline.decoding = pipeline.decoding.changed(**changes)
    return pipeline


def timed(pipeline: ImagePipeline, batch: int) -> float:
    """Return the seconds of CPU time that the tokens of a batch take, of the classes in turn."""
    labels = torch.arange(batch) % len(pipeline.class_names)
    began = time.process_time()
    pipeline.sample_tokens(labels, 0, range(batch))
    return time.process_time() - began
