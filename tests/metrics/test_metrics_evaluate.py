"""The evaluation command: one subject, one reference, one record; on two processes as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vistok import FSQ, ConvTokenizer, ImagePipeline, LlamaGen
from vistok.commands import evaluate as command
from vistok.commands import stats
from vistok.data import Emoji, Transform
from vistok.errors import UserError
from vistok.metrics import Pictures, load_features

ROOT = Path(__file__).parents[2]
CROP = Transform("resize-center-crop", 16)


@pytest.fixture(scope="module")
def evaluate():
    """`main` of the command, on random features."""
    return lambda **options: command.main(**{"features": "random"} | options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(
        FSQ((4, 4)),
        image_size=16,
        patch_size=4,
        channels=8,
        channel_multipliers=(1,),
        num_res_blocks=1,
        z_channels=8,
        attention=False,
    )
    generator = LlamaGen(tokenizer.spec, list(Emoji().class_names), dim=16, depth=1, num_heads=2)
    path = tmp_path_factory.mktemp("checkpoint")
    ImagePipeline(tokenizer, generator).save_pretrained(path)
    return str(path)


@pytest.fixture
def output(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "metrics.json"


def scores(output: Path) -> dict[str, dict[str, float]]:
    return {name: record["scores"] for name, record in json.loads(output.read_text()).items()}


def test_a_reference_is_made_once_and_used_again(evaluate, output):
    emoji = {"data": Emoji("held-out"), "count": 40, "size": 16}
    stats.main(**emoji, features="random", output="reference.npz")
    assert not output.exists()
    evaluate(**emoji, reference="reference.npz", name="itself")
    found = scores(output)["itself"]
    assert found["fid"] == pytest.approx(0, abs=1e-5)
    assert found["precision"] == found["recall"] == 1
    record = json.loads(output.read_text())["itself"]
    assert record["protocol"]["reference"] == record["subject"]["data"]
    assert "not comparable" in record["protocol"]["features"]


def test_statistics_are_those_of_adm(output, capsys):
    stats.main(Emoji("held-out"), "reference.npz", "random", size=16, count=40)
    assert "emoji (held-out, white), 40 of 433 pictures" in capsys.readouterr().out
    arrays = np.load("reference.npz", allow_pickle=False)
    assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    assert arrays["sigma"].shape == 2 * arrays["mu"].shape
    images = torch.stack([pixels for _, pixels in Pictures(Emoji("held-out"), CROP, 40)])
    vectors = load_features("random", None)(images).vectors.double().numpy()
    assert arrays["mu"] == pytest.approx(vectors.mean(0))
    assert arrays["sigma"] == pytest.approx(np.cov(vectors.T), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "statistics"}, "--output statistics: statistics are written as .npz"),
        ({"count": 1}, "at least 2 pictures"),
        ({"batch_size": 0}, "at least 1"),
        ({"data": "missing"}, "missing"),
    ],
)
def test_mistakes_in_statistics(options, message, output):
    with pytest.raises(UserError, match=message):
        stats.main(**{"data": Emoji("held-out"), "output": "a.npz", "features": "random"} | options)
    assert not list(output.parent.iterdir())


def test_a_tokenizer_and_its_baseline(evaluate, checkpoint, output, capsys):
    tokenizer = {"tokenizer": f"{checkpoint}/tokenizer", "data": Emoji("held-out"), "count": 20}
    evaluate(**tokenizer, metrics=["fid", "psnr", "ssim", "codebook"])
    first = scores(output)["reconstruction"]
    assert set(first) == {"rfid", "psnr", "ssim", "codebook_usage", "codebook_perplexity"}
    evaluate(**tokenizer, metrics=["fid", "psnr"], name="again", baseline="reconstruction")
    assert "(+0)" in capsys.readouterr().out
    assert scores(output)["again"] == {key: first[key] for key in ("rfid", "psnr")}
    with pytest.raises(UserError, match=r"different protocols.*count"):
        evaluate(**tokenizer | {"count": 10}, baseline="reconstruction")


def test_scores_of_pairs_need_no_feature_network(evaluate, checkpoint, output):
    tokenizer = {"tokenizer": f"{checkpoint}/tokenizer", "data": Emoji("held-out"), "count": 4}
    evaluate(**tokenizer, metrics=["psnr"], features="inception", feature_weights="missing.pth")
    assert set(scores(output)["reconstruction"]) == {"psnr"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --checkpoint, or --tokenizer"),
        ({"data": "x", "checkpoint": "y"}, "give --checkpoint, or --tokenizer"),
        ({"data": Emoji("held-out")}, "nothing to score"),
        ({"data": Emoji("held-out"), "count": 0}, "at least 1"),
        ({"data": Emoji("held-out"), "metrics": ["psnr"]}, "'psnr' needs a tokenizer"),
        ({"data": "missing.npz"}, "missing.npz: no such file"),
        ({"data": Emoji("held-out"), "features": "inception"}, "--feature_weights"),
    ],
)
def test_mistakes_end_before_any_work(options, message, evaluate, output, monkeypatch):
    monkeypatch.setattr("vistok.metrics.Collector.update", lambda *_: pytest.fail("worked"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(output.parent))
    with pytest.raises(UserError, match=message):
        evaluate(**options)
    assert not output.exists()


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(evaluate, checkpoint, output):
    emoji = Emoji("held-out")
    stats.main(emoji, "reference.npz", "random", size=16, count=40)
    metrics = ["fid", "kid", "precision_recall"]
    sampled = {"checkpoint": checkpoint, "count": 21, "batch_size": 8, "reference": "reference.npz"}
    evaluate(**sampled, metrics=metrics, name="one")
    tokenizer = {"tokenizer": f"{checkpoint}/tokenizer", "count": 33, "batch_size": 8}
    evaluate(**tokenizer, data=emoji, name="one-tokenizer")

    data = ("--data", "Emoji", "--data.split", "held-out", "--name", "two-tokenizer")
    for options, more in (
        (sampled, ("--metrics", json.dumps(metrics), "--name", "two")),
        (tokenizer, data),
    ):
        words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "-m", "vistok.cli", "evaluate", *words, *more, "--features", "random"],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
    found = scores(output)
    for one, two in (("one", "two"), ("one-tokenizer", "two-tokenizer")):
        assert found[two] == pytest.approx(found[one], rel=1e-6)
