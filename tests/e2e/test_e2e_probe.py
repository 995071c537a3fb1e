"""Probing from the command line: what the tokens of a tiny random tokenizer tell of emoji."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, run

from vistok import FSQ, ConvTokenizer, Gaussian, KLTokenizer, MultiScale, TiTok
from vistok.data import Emoji
from vistok.tokenizers.kl import KLAutoencoder

HELD_OUT = ("--data", "Emoji", "--data.split", "held-out")
SCORES = ("dim", "L2", "accuracy", "balanced_accuracy", "R@1", "R@5", "R@10", "mAP")


def grid(scales: tuple[int, ...] | None = None) -> ConvTokenizer:
    return ConvTokenizer(
        MultiScale(FSQ((4, 4)), scales) if scales else FSQ((4, 4)),
        image_size=16,
        patch_size=4,
        channels=8,
        channel_multipliers=(1,),
        num_res_blocks=1,
        z_channels=8,
        attention=False,
    )


def sequence(tail_drop: str | None) -> TiTok:
    sizes = dict.fromkeys(("encoder_width", "decoder_width"), 16)
    sizes |= dict.fromkeys(("encoder_depth", "decoder_depth"), 1)
    sizes |= dict.fromkeys(("encoder_heads", "decoder_heads"), 2)
    return TiTok(FSQ((4, 4, 4)), image_size=16, num_latent_tokens=5, tail_drop=tail_drop, **sizes)


def continuous() -> KLTokenizer:
    vae = KLAutoencoder(4, (8, 8), layers_per_block=1, norm_groups=4)
    return KLTokenizer(Gaussian(4), vae, image_size=16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("probed") / "tokenizer"
    grid().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Some emoji of either side, training and held out, in directories of their classes."""
    folders = []
    for split, step in (("train", 15), ("held-out", 4)):
        source, folder = Emoji(split), tmp_path_factory.mktemp(split)
        for index in range(0, len(source), step):
            sample = source[index]
            (folder / str(sample.label)).mkdir(exist_ok=True)
            sample.image.save(folder / str(sample.label) / f"{sample.key}.png")
        folders.append(folder)
    return tuple(folders)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (grid, (16, 2)),
        (lambda: grid((1, 2, 4)), (16, 2)),
        (lambda: sequence(None), (5, 3)),
        (continuous, (64, 4)),
    ],
    ids=["grid", "scales", "sequence", "continuous"],
)
def test_features_are_what_the_tokens_stand_for(make, shape):
    torch.manual_seed(0)
    model, images = make().eval(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        features = model.features(images)["tokens"]
        assert features.shape == (2, *shape)
        latents = model.quantizer.decode(model.encode(images))
        assert torch.equal(features, latents.reshape(2, *shape))
        # They hold all that decoding reads.
        decoded = model.to_images(features.view_as(latents)).clamp(0, 1)
        assert torch.equal(decoded, model.decode(model.encode(images)))


def test_probe_prints_a_table_and_keeps_the_scores(tokenizer, tmp_path, capfd):
    output = tmp_path / "metrics.json"
    options = ("--probe", "true", "--tokenizer", tokenizer, *HELD_OUT, "--reference", "Emoji")
    code, out, err = run(capfd, "sample/evaluate.py", *options, "--output", output)
    assert code == 0, err
    head, *rows = [line.split() for line in out.splitlines()[1:6]]
    assert tuple(head) == SCORES
    assert [row[0] for row in rows] == ["tokens", "pixels", "majority", "chance"]
    result = json.loads(output.read_text())["probe"]
    scores = result["scores"]
    assert {f"{features}/{s}" for features in ("tokens", "pixels") for s in SCORES} < set(scores)
    assert (scores["tokens/dim"], scores["pixels/dim"]) == (2, 192)
    assert scores["pixels/accuracy"] > scores["majority/accuracy"] > 0.5
    assert scores["pixels/balanced_accuracy"] > scores["majority/balanced_accuracy"]
    assert scores["majority/balanced_accuracy"] == pytest.approx(1 / 9)
    assert scores["pixels/mAP"] > scores["chance/mAP"]
    assert result["protocol"]["task"] == "probe"
    assert "train" in result["protocol"]["reference"]
    assert "held-out" in result["protocol"]["pictures"]


def test_scores_do_not_depend_on_the_batch(tokenizer, folders, tmp_path, capfd):
    training, held_out = folders
    output = tmp_path / "metrics.json"
    options = ("--probe", "true", "--tokenizer", tokenizer, "--data", held_out,
               "--reference", training, "--output", output)  # fmt: skip
    code, _, err = run(capfd, "sample/evaluate.py", *options)
    assert code == 0, err
    again = ("--name", "again", "--baseline", "probe", "--batch_size", 17)
    code, out, err = run(capfd, "sample/evaluate.py", *options, *again)
    assert code == 0, err
    assert "(+0)" in out
    results = json.loads(output.read_text())
    assert results["again"]["scores"] == results["probe"]["scores"]
    flat = ("--pooling", "flat", "--baseline", "probe")
    code, _, err = run(capfd, "sample/evaluate.py", *options, *flat)
    assert (code, "different protocols" in err) == (2, True)


def test_probe_reads_the_first_tokens(folders, tmp_path, capfd):
    training, held_out = folders
    torch.manual_seed(0)
    sequence("uniform").save_pretrained(tmp_path / "tokenizer")
    code, out, err = run(
        capfd, "sample/evaluate.py", "--probe", "true", "--tokenizer", tmp_path / "tokenizer",
        "--data", held_out, "--reference", training, "--pooling", "flat", "--length", 2,
        "--output", tmp_path / "metrics.json",
    )  # fmt: skip
    assert code == 0, err
    assert out.splitlines()[2].split()[:2] == ["tokens", "6"]
    record = json.loads((tmp_path / "metrics.json").read_text())["probe"]["subject"]
    assert record["tokens"].startswith("2 ordered ids")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*HELD_OUT,), "--probe takes --tokenizer, --data, which is held out, and --reference"),
        (("--reference", "Emoji"), "--probe takes"),
        ((*HELD_OUT, "--reference", "Emoji", "--metrics", '["psnr"]'), "no --checkpoint"),
        ((*HELD_OUT, "--reference", "Emoji", "--pooling", "max"), "pooling"),
        ((*HELD_OUT, "--reference", "Emoji", "--length", 3), "decodes from all 16 tokens"),
        ((*HELD_OUT, "--reference", "FOLDER"), "have different classes"),
        ((*HELD_OUT, "--reference", "FOLDER/0"), "all of one class"),
        (("--data", "Emoji", "--reference", "Emoji"), "hold other pictures out"),
    ],
)
def test_mistakes_end_in_one_line(options, message, tokenizer, folders, tmp_path, capfd):
    options = [str(option).replace("FOLDER", str(folders[0])) for option in options]
    output = tmp_path / "metrics.json"
    code, _, err = run(
        capfd, "sample/evaluate.py", "--probe", "true", "--tokenizer", tokenizer, *options,
        "--output", output,
    )  # fmt: skip
    assert code == 2
    assert message in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not output.exists()


def test_scales_are_read_as_their_sum(folders, tmp_path, capfd):
    grid((1, 2, 4)).save_pretrained(tmp_path / "tokenizer")
    code, _, err = run(
        capfd, "sample/evaluate.py", "--probe", "true", "--tokenizer", tmp_path / "tokenizer",
        "--data", folders[1], "--reference", folders[0], "--length", 5,
    )  # fmt: skip
    assert (code, "as their sum" in err) == (2, True)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tokenizer, folders, tmp_path, capfd):
    training, held_out = map(str, folders)
    output = tmp_path / "metrics.json"
    options = ("--probe", "true", "--tokenizer", tokenizer, "--data", held_out,
               "--reference", training, "--output", str(output))  # fmt: skip
    code, _, err = run(capfd, "sample/evaluate.py", *options, "--name", "one")
    assert code == 0, err
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         ROOT / "sample" / "evaluate.py", *options, "--name", "two"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    results = json.loads(output.read_text())
    assert results["two"]["scores"] == results["one"]["scores"]
