"""Bad input, a table over the real commands: one clear line, exit code 2, nothing half-written."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run
from PIL import Image

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Places:
    """Good and broken inputs, and `out`, which no failing command may create."""

    def __init__(self, tmp_path: Path, good: Path, configs: Path):
        self.tmp, self.good, self.configs, self.out = tmp_path, good, configs, tmp_path / "out"

    def broken(self, damage: Callable[[Path], object]) -> Path:
        copy = self.tmp / "broken"
        shutil.copytree(self.good, copy, ignore=shutil.ignore_patterns("checkpoints"))
        damage(copy)
        return copy

    def folder(self, **files: bytes) -> Path:
        folder = self.tmp / "folder"
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_bytes(content)
        return folder


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[:200])


def png(path: Path) -> bytes:
    file = path / "ok.png"
    Image.new("RGB", (16, 16)).save(file)
    return file.read_bytes()


def train_tokenizer(p, *more):
    return (
        "train/tokenizer.py",
        "--config",
        p.configs / "tokenizer.yaml",
        "--output",
        p.out,
        *more,
    )


def train_generator(p, *more):
    config = ("--config", p.configs / "generator.yaml", "--tokenizer", p.good / "tokenizer")
    return ("train/generator.py", *config, "--output", p.out, *more)


def generate(p, checkpoint, *more):
    return ("sample/generate.py", "--checkpoint", checkpoint, "--output", p.out, *more)


def reconstruct(p, *more):
    return ("sample/reconstruct.py", "--output", p.out, *more)


def evaluate(p, *more):
    return ("sample/evaluate.py", "--output", p.out, "--features", "random", *more)


CASES = {
    # Configs and options.
    "a config that is missing": (
        lambda p: ("train/tokenizer.py", "--config", p.tmp / "no.yaml"),
        "no.yaml",
    ),
    "a wrong key": (lambda p: train_tokenizer(p, "--imges", 8), "did you mean 'images'"),
    "a wrong key in a group": (lambda p: train_tokenizer(p, "--optimizer.lrr", 1), "lrr"),
    "a wrong key of a class": (
        lambda p: train_tokenizer(p, "--tokenizer.chanels", 8),
        "did you mean 'channels'",
    ),
    "a wrong class": (
        lambda p: train_tokenizer(p, "--tokenizer", "ConvTokenzer"),
        "did you mean 'ConvTokenizer'",
    ),
    "a wrong type": (lambda p: train_tokenizer(p, "--images", "many"), "images"),
    "a wrong schedule": (
        lambda p: generate(p, p.good, "--guidance", "liner(1,2)"),
        "did you mean 'linear'",
    ),
    "a size that does not divide": (
        lambda p: train_tokenizer(p, "--tokenizer.image_size", 18),
        "divisible by 4",
    ),
    "a wrong transform": (lambda p: train_tokenizer(p, "--transform", "randm-flip"), "random-flip"),
    "neither pictures nor tokens": (lambda p: train_generator(p, "--data", "null"), "either data"),
    # Checkpoints.
    "a checkpoint that is missing": (lambda p: generate(p, p.tmp / "nothing"), "nothing"),
    "a checkpoint of another kind": (
        lambda p: reconstruct(p, "--tokenizer", p.good / "generator"),
        "holds a LlamaGen, expected a Tokenizer",
    ),
    "truncated weights": (
        lambda p: generate(p, p.broken(lambda d: truncate(d / "generator" / WEIGHTS))),
        "generator",
    ),
    "pickled weights": (
        lambda p: generate(
            p, p.broken(lambda d: (d / "tokenizer" / WEIGHTS).write_bytes(pickle.dumps([1])))
        ),
        "tokenizer",
    ),
    "a tokenizer of other tokens": (
        lambda p: train_generator(p, "--tokenizer", p.good / "generator"),
        "expected a Tokenizer",
    ),
    # Classes and counts.
    "a class out of range": (lambda p: generate(p, p.good, "--classes", '["9"]'), "0-8"),
    "a class that is misspelt": (
        lambda p: generate(p, p.good, "--classes", '["Flgs"]'),
        "did you mean 'Flags'",
    ),
    "prompts for a class-conditional model": (
        lambda p: generate(p, p.good, "--prompts", '["a red circle"]'),
        "this model is class-conditional: it takes class labels, not prompts",
    ),
    "a text encoder for a class-conditional model": (
        lambda p: generate(p, p.good, "--text_encoder", "google/flan-t5-xl"),
        "this model is class-conditional",
    ),
    "prompts that are no file": (
        lambda p: generate(p, p.good, "--prompts", "a red circle"),
        "no file of prompts",
    ),
    "a text-conditional model without captions": (
        lambda p: train_generator(p, "--generator.caption_dim", 16),
        "trains and validates on token caches",
    ),
    "weights that do not fit": (
        lambda p: train_generator(p, "--initial", p.good / "generator", "--generator.dim", 16),
        "tensor(s) do not fit",
    ),
    "a text encoder that is missing": (
        lambda p: (
            *("vistok/cli.py", "cache", "--tokenizer", p.good / "tokenizer", "--data", "Emoji"),
            *("--output", p.out, "--text_encoder", p.tmp / "nothing"),
        ),
        "no readable T5",
    ),
    "no images": (lambda p: generate(p, p.good, "--count", 0), "at least 1"),
    "a wrong temperature": (lambda p: generate(p, p.good, "--temperature", -1), "temperature"),
    # Pictures.
    "an empty folder": (
        lambda p: evaluate(p, "--data", p.folder(), "--reference", "Emoji"),
        "folder",
    ),
    "a picture that does not decode": (
        lambda p: evaluate(
            p, "--data", p.folder(a_png=b"not a picture", b_png=png(p.tmp)), "--reference", "Emoji",
            "--size", 16, "--metrics", '["fid"]',
        ),
        "a.png",
    ),
    "too few images": (
        lambda p: evaluate(p, "--data", p.folder(a_png=png(p.tmp)), "--reference", "Emoji"),
        "1 image",
    ),
    "a folder that is missing": (
        lambda p: reconstruct(
            p, "--tokenizer", p.good / "tokenizer", "--data", "ImageFolder",
            "--data.root", p.tmp / "no",
        ),
        "no",
    ),
    "features without weights": (
        lambda p: evaluate(p, "--data", p.good, "--reference", "Emoji", "--features", "inception"),
        "feature_weights",
    ),
    "features that do not exist": (
        lambda p: evaluate(p, "--data", "Emoji", "--features", "inceptoin"),
        "inception",
    ),
    "a command that does not exist": (lambda p: ("vistok/cli.py", "cach"), "did you mean 'cache'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_one_line(case, tmp_path, run_folder, configs, capfd):
    command, expected = CASES[case]
    places = Places(tmp_path, run_folder, configs)
    code, _, err = run(capfd, *command(places))
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert expected in last
    assert "Traceback" not in err
    assert not places.out.exists()
