"""Runs that take a second: 20 pictures of 16 x 16 pixels, models of a few thousand weights."""

import importlib.util
import os
import signal
from pathlib import Path

import torch
from PIL import Image

from vistok import VQ, ConvTokenizer, LlamaGen
from vistok.data import ImageSource, Sample
from vistok.losses import PatchDiscriminator, TokenizerLoss
from vistok.training import OptimizerConfig, RunConfig

ROOT = Path(__file__).parents[2]
SIZE = 20  # pictures: with steps of 8, epochs end inside a step


def script(name: str):
    """Return train/`name`.py as a module."""
    spec = importlib.util.spec_from_file_location(f"train_{name}", ROOT / "train" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Squares(ImageSource):
    """Coloured squares in two classes; reading number `stop_after` sends this process SIGTERM."""

    name = "squares"
    class_names = ("dark", "bright")

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.read: list[int] = []

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        if len(self.read) == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        colour = tuple(int(c) for c in torch.tensor([37, 91, 53]) * index % 256)
        image = Image.new("RGB", (16, 16), "white")
        image.paste(colour, (index % 8, 2, 8 + index % 8, 12))
        return Sample(image, index % 2, "", str(index))

    def labels(self) -> torch.Tensor:
        return torch.arange(SIZE) % 2


def tiny_tokenizer() -> ConvTokenizer:
    torch.manual_seed(1)
    return ConvTokenizer(
        VQ(16, 4, revival=True),
        image_size=16,
        channels=32,
        channel_multipliers=(1, 1, 1),
        num_res_blocks=1,
        z_channels=8,
        attention=False,
        dropout=0.1,
    )


def tiny_generator(spec, class_names) -> LlamaGen:
    return LlamaGen(spec, class_names, dim=16, depth=1, num_heads=2, dropout=0.1)


def adversarial_loss() -> TokenizerLoss:
    torch.manual_seed(2)
    return TokenizerLoss(
        adversarial_weight=0.1,
        adversarial_start=2,
        adaptive=True,
        discriminator=PatchDiscriminator(4, 1),
        lecam_weight=0.001,
    )


def train_tokenizer(output: Path, steps: int = 8, data: ImageSource | None = None, **options):
    """Run train/tokenizer.py's `main`, by default with an adversary and two micro-batches."""
    settings = {
        "tokenizer": options.pop("tokenizer", None) or tiny_tokenizer(),
        "data": data or Squares(),
        "images": 8 * steps,
        "batch_size": 8,
        "accumulation": 2,
        "transform": "random-flip",
        "loss": adversarial_loss(),
        "optimizer": OptimizerConfig(lr=3e-3, warmup_steps=2),
        "ema_decay": 0.9,
        "run": quick(),
    }
    script("tokenizer").main(output=str(output), **settings | options)


def train_plain(output: Path, data: ImageSource):
    """Go on with a run of 6 steps without dropout and batch norm, which comes out the same however
    its steps are split."""
    tokenizer = tiny_tokenizer()
    for module in tokenizer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    train_tokenizer(
        output, 6, data, tokenizer=tokenizer, loss=None, resume=True, run=quick(log_every=1)
    )


def train_generator(output: Path, tokenizer: Path, steps: int = 8, **options):
    """Run train/generator.py's `main`."""
    settings = {
        "generator": tiny_generator,
        "tokenizer": str(tokenizer),
        "images": 8 * steps,
        "batch_size": 8,
        "transform": "random-flip",
        "optimizer": OptimizerConfig(lr=3e-3),
        "run": quick(),
    }
    if "tokens" not in options:
        settings["data"] = Squares()
    script("generator").main(output=str(output), **settings | options)


def quick(**options) -> RunConfig:
    settings = {"num_workers": 0, "log_every": 3, "save_every": 100, "validate_every": 0}
    return RunConfig(**settings | options)


def latest(output: Path) -> Path:
    return max((output / "checkpoints").glob("step-*"))
