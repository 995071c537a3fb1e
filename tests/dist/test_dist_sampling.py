"""Two processes sample and encode what one does, each image once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vistok import FSQ, ConvTokenizer, ImagePipeline, LlamaGen
from vistok.data import Emoji, TokenCache
from vistok.text import TextEncoder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = ConvTokenizer(
        FSQ([4, 4]), image_size=16, channels=8, channel_multipliers=[1], patch_size=4,
        num_res_blocks=1, z_channels=8, attention=False,
    )  # fmt: skip
    generator = LlamaGen(tokenizer.spec, ["a", "b", "c"], dim=32, depth=1, num_heads=2)
    torch.nn.init.normal_(generator.head.linear.weight)
    ImagePipeline(tokenizer, generator).save_pretrained(folder)
    return folder


def run(processes: int, *command: object) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--cpu", "--main_process_port", port]
        launch += ["--num_processes", str(processes)]
    done = subprocess.run(
        [*launch, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_samples_are_those_of_one_process(checkpoint, tmp_path):
    for processes in (1, 2):
        out = run(
            processes, "sample/generate.py", "--checkpoint", checkpoint, "--count", 11,
            "--batch_size", 4, "--output", tmp_path / str(processes),
        )  # fmt: skip
        assert out.count("11 images") == 1
    one, two = (sorted((tmp_path / n).glob("*.png")) for n in "12")
    assert len(one) == 11
    assert [f.name for f in one] == [f.name for f in two]
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two]


def test_a_token_cache_is_that_of_one_process(checkpoint, tmp_path):
    for processes in (1, 2):
        run(
            processes, "-m", "vistok.cli", "cache", "--tokenizer", checkpoint / "tokenizer",
            "--data", "Emoji", "--data.split", "held-out", "--transform", "random-flip",
            "--crops", 2, "--num_workers", 0, "--output", tmp_path / str(processes),
        )  # fmt: skip
    one, two = (tmp_path / "1", tmp_path / "2")
    assert sorted(f.name for f in two.iterdir()) == ["header.json", "labels.npy", "tokens.npy"]
    for name in ("header.json", "labels.npy", "tokens.npy"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_captions_are_those_of_one_process(checkpoint, text_encoder, tmp_path):
    run(
        2, "-m", "vistok.cli", "cache", "--tokenizer", checkpoint / "tokenizer", "--data", "Emoji",
        "--data.split", "held-out", "--text_encoder", text_encoder, "--caption_length", 10,
        "--num_workers", 0, "--output", tmp_path / "2",
    )  # fmt: skip
    cache = TokenCache(tmp_path / "2")
    assert len(list((tmp_path / "2").glob("captions-*.npy"))) == 2
    expected = TextEncoder(text_encoder, 10).encode(Emoji("held-out").captions)
    assert len(cache) == len(expected)
    for i in range(len(cache)):
        item = cache.get(i, torch.Generator())
        assert torch.equal(item["caption_mask"], expected.mask[i])
        # What is rounded to half precision differs by rounding itself from batch to batch.
        assert torch.allclose(item["captions"].float(), expected.features[i], atol=2e-3)
