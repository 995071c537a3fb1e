"""From captions to images, by the real commands: encode, train, go on, sample by prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

from vistok import Generator, ImagePipeline
from vistok.data import TokenCache

PROMPTS = ["a red circle", "Flag: Norway!"]


@pytest.fixture(scope="module")
def text_run(run_folder, configs, text_encoder, tmp_path_factory) -> Path:
    """A folder with tokens/, tokenizer/ and a text-conditional generator/ of four steps."""
    folder = tmp_path_factory.mktemp("text-run")
    (folder / "tokenizer").symlink_to(run_folder / "tokenizer")
    return folder


@pytest.fixture
def trained(text_run, configs, text_encoder, capfd) -> Path:
    if (text_run / "generator").exists():
        return text_run
    code, out, err = run(
        capfd, "vistok/cli.py", "cache", "--tokenizer", text_run / "tokenizer", "--data", "Emoji",
        "--data.split", "held-out", "--text_encoder", text_encoder, "--caption_length", 12,
        "--num_workers", 0, "--output", text_run / "tokens",
    )  # fmt: skip
    assert code == 0, err
    assert f"captions 12 x 16 of {text_encoder}" in out
    code, _, err = train(capfd, text_run, configs, "--run.validate_every", 4)
    assert code == 0, err
    return text_run


def train(capfd, folder: Path, configs: Path, *more: object) -> tuple[int, str, str]:
    return run(
        capfd, "train/generator.py", "--config", configs / "generator.yaml", "--data", "null",
        "--tokenizer", folder / "tokenizer", "--tokens", folder / "tokens",
        "--validation", folder / "tokens", "--output", folder / "generator",
        "--generator.caption_dim", 16, "--generator.caption_length", 12,
        *more,
    )  # fmt: skip


def generate(capfd, checkpoint: Path, *more: object) -> tuple[int, str, str]:
    return run(capfd, "sample/generate.py", "--checkpoint", checkpoint, "--seed", 5, *more)


def test_a_text_conditional_generator_trains_on_a_cache(trained, text_encoder):
    held = TokenCache(trained / "tokens").header.captions
    assert (held.encoder, held.length, held.dim) == (text_encoder, 12, 16)
    last = json.loads((trained / "generator" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and last["validation/loss"] > 0
    # Eight captions, each with its picture and eight samples.
    picture = Image.open(trained / "generator" / "validation" / "step-00000004.png")
    assert picture.height == 8 * (16 + 2) + 2
    assert picture.width > 9 * (16 + 2)
    assert ImagePipeline.from_pretrained(trained).text_encoder == text_encoder


def test_images_follow_prompt_and_seed(trained, tmp_path, capfd):
    output, file = tmp_path / "samples", tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    pipeline = ImagePipeline.from_pretrained(trained)
    # Four steps from a head of zeros leave captions without visible effect.
    torch.nn.init.normal_(pipeline.generator.head.linear.weight)
    pipeline.save_pretrained(tmp_path / "loud")
    trained, options = tmp_path / "loud", ("--count", 6, "--batch_size", 4, "--output")
    code, _, err = generate(capfd, trained, "--prompts", file, *options, output)
    assert code == 0, err
    images = sorted(output.glob("*.png"))
    assert [image.name for image in images[:3]] == [
        "000000-seed5-a-red-circle.png",
        "000001-seed5-flag-norway.png",
        "000002-seed5-a-red-circle.png",
    ]
    assert (tmp_path / "samples.png").exists()

    # What is missing is made again, in another batch, from the same prompts in another form.
    content = images[4].read_bytes()
    images[4].unlink()
    code, _, err = generate(capfd, trained, "--prompts", json.dumps(PROMPTS), *options, output)
    assert code == 0, err
    assert images[4].read_bytes() == content

    other = json.dumps(["a blue square", PROMPTS[1]])
    code, _, err = generate(capfd, trained, "--prompts", other, *options, output)
    assert (code, "other settings (prompts)" in err) == (2, True)
    code, _, err = generate(capfd, trained, "--prompts", other, *options, tmp_path / "others")
    assert code == 0, err
    pairs = zip(images, sorted((tmp_path / "others").glob("*.png")), strict=True)
    same = [np.array_equal(*map(np.asarray, map(Image.open, pair))) for pair in pairs]
    assert same[1::2] == [True] * 3
    assert not any(same[::2])


def test_training_starts_from_given_weights(trained, configs, tmp_path, capfd):
    code, _, err = train(
        capfd, trained, configs, "--initial", trained / "generator", "--images", 8,
        "--output", tmp_path / "g", "--optimizer.lr", 0, "--run.validate_every", 0,
    )  # fmt: skip
    assert code == 0, err
    assert (
        Generator.from_pretrained(tmp_path / "g").fingerprint()
        == Generator.from_pretrained(trained / "generator").fingerprint()
    )


def test_wrong_combinations_end_in_one_line(trained, configs, text_encoder, tmp_path, capfd):
    prompts, out = ("--prompts", '["a cat"]'), ("--output", tmp_path / "out")
    for command, expected in [
        (lambda: generate(capfd, trained, *out), "it takes prompts, not class labels"),
        (lambda: generate(capfd, trained, *out, "--classes", '["1"]'), "it takes prompts, not"),
        (
            lambda: generate(capfd, trained, *out, *prompts, "--classes", '["1"]'),
            "give either --classes or --prompts",
        ),
        (
            lambda: generate(capfd, trained, *out, *prompts, "--text_encoder", tmp_path),
            "no readable T5",
        ),
        (
            lambda: generate(capfd, trained, *out, "--prompts", '[" "]'),
            "holds no prompt",
        ),
        (
            lambda: train(capfd, trained, configs, *out, "--generator.caption_length", 9),
            f"holds captions 12 x 16 of {text_encoder}, the generator takes 9 x 16",
        ),
        (
            lambda: run(
                capfd, "sample/evaluate.py", "--checkpoint", trained, "--features", "random",
                "--reference", "Emoji", "--output", tmp_path / "out",
            ),
            "sample it by `vistok generate --prompts",
        ),
    ]:  # fmt: skip
        code, _, err = command()
        assert code == 2, err
        assert expected in err.strip().splitlines()[-1]
        assert not (tmp_path / "out").exists()
