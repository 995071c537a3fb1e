"""The commands of the README, end to end, in tiny form."""

import json

import numpy as np
import pytest
from commands import run
from PIL import Image

from vistok import ImagePipeline
from vistok.data import TokenCache


def test_training_leaves_loadable_models_and_logs(run_folder):
    pipeline = ImagePipeline.from_pretrained(run_folder)
    assert len(pipeline.class_names) == 9
    for part in ("tokenizer", "generator"):
        lines = (run_folder / part / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == 4
    validation = json.loads((run_folder / "tokenizer" / "log.jsonl").read_text().splitlines()[-1])
    assert validation["validation/psnr"] > 0


def test_a_finished_run_has_nothing_to_do(run_folder, configs, capfd):
    options = ("--config", configs / "tokenizer.yaml", "--output", run_folder / "tokenizer")
    before = (run_folder / "tokenizer" / "log.jsonl").read_bytes()
    code, *_ = run(capfd, "train/tokenizer.py", *options, "--resume", "true")
    assert code == 0
    assert (run_folder / "tokenizer" / "log.jsonl").read_bytes() == before


def test_generate_writes_goes_on_and_packs(run_folder, tmp_path, capfd):
    output = tmp_path / "samples"
    options = ("--checkpoint", run_folder, "--output", output, "--seed", 5, "--batch_size", 4)
    code, out, err = run(capfd, "sample/generate.py", *options, "--count", 12, "--npz", "true")
    assert code == 0, err
    assert "16 passes an image" in out
    names = sorted(f.name for f in output.glob("*.png"))
    assert len(names) == 12
    assert names[1] == "000001-seed5-people-body.png"
    pixels = np.load(output / "samples.npz", allow_pickle=False)["arr_0"]
    assert pixels.shape == (12, 16, 16, 3)
    assert np.array_equal(pixels[3], np.asarray(Image.open(output / names[3])))
    assert Image.open(tmp_path / "samples.png").width > 64

    # Whatever is missing is made again, equal to what it was, in another batch.
    gone = output / names[7]
    content = gone.read_bytes()
    gone.unlink()
    code, out, _ = run(capfd, "sample/generate.py", *options, "--count", 12)
    assert code == 0
    assert np.array_equal(np.asarray(Image.open(gone)), pixels[7])
    assert gone.read_bytes() == content

    code, _, err = run(capfd, "sample/generate.py", *options, "--count", 12, "--guidance", 3)
    assert code == 2
    assert "other settings (decoding)" in err


def test_generate_takes_listed_classes(run_folder, tmp_path, capfd):
    options = ("--checkpoint", run_folder, "--output", tmp_path / "s", "--count", 4)
    code, _, err = run(capfd, "sample/generate.py", *options, "--classes", '["Flags", "2"]')
    assert code == 0, err
    assert [f.stem.split("-", 2)[2] for f in sorted((tmp_path / "s").glob("*.png"))] == [
        "flags", "animals-nature", "flags", "animals-nature",
    ]  # fmt: skip


def test_reconstruct_draws_a_grid(run_folder, tmp_path, capfd):
    output = tmp_path / "r.png"
    options = ("--tokenizer", run_folder / "tokenizer", "--output", output, "--count", 8)
    code, out, err = run(capfd, "sample/reconstruct.py", *options, "--columns", 4)
    assert code == 0, err
    assert "4x4 ids of 16" in out
    assert Image.open(output).height == 4 * (64 + 8) + 8


def test_a_generator_trains_on_a_token_cache(run_folder, configs, tmp_path, capfd):
    cache = tmp_path / "tokens"
    encode = (
        "--tokenizer",
        run_folder / "tokenizer",
        "--data",
        "Emoji",
        "--data.split",
        "held-out",
    )
    code, _, err = run(capfd, "vistok/cli.py", "cache", *encode, "--output", cache,
                       "--num_workers", 0)  # fmt: skip
    assert code == 0, err
    assert TokenCache(cache).spec.shape == (4, 4)
    code, out, _ = run(capfd, "vistok/cli.py", "cache", *encode, "--output", cache)
    assert (code, "already" in out) == (0, True)
    code, _, err = run(capfd, "vistok/cli.py", "cache", *encode, "--output", cache,
                       "--transform", "random-flip")  # fmt: skip
    assert (code, "remove it first" in err) == (2, True)
    train = ("--config", configs / "generator.yaml", "--tokenizer", run_folder / "tokenizer")
    on_cache = (*train, "--data", "null", "--tokens", cache)
    code, _, err = run(capfd, "train/generator.py", *on_cache, "--output", tmp_path / "g")
    assert code == 0, err
    # The same tokens, in the same order, from pictures or from the cache: the same losses.
    logs = [
        [json.loads(line)["loss"] for line in (f / "log.jsonl").read_text().splitlines()]
        for f in (tmp_path / "g", run_folder / "generator")
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_evaluate_scores_a_tokenizer_and_a_generator(run_folder, tmp_path, capfd):
    output = tmp_path / "metrics.json"
    emoji = ("Emoji", "--data.split", "held-out")
    code, out, err = run(
        capfd, "sample/evaluate.py", "--tokenizer", run_folder / "tokenizer", "--data", *emoji,
        "--count", 24, "--features", "random", "--output", output,
    )  # fmt: skip
    assert code == 0, err
    assert "psnr" in out
    code, out, err = run(
        capfd, "sample/evaluate.py", "--checkpoint", run_folder, "--reference", "Emoji",
        "--reference.split", "held-out", "--count", 18, "--metrics", '["fid"]',
        "--features", "random", "--output", output, "--transform", "resize-center-crop",
    )  # fmt: skip
    assert code == 0, err
    assert "not comparable" in out
    results = json.loads(output.read_text())
    assert len(results) >= 2


def test_info_describes_both_parts(run_folder, capfd):
    code, out, _ = run(capfd, "vistok/cli.py", "info", "--checkpoint", run_folder)
    assert code == 0
    assert "ConvTokenizer" in out
    assert "raster, 16 passes" in out


def test_export_writes_a_small_checkpoint_with_its_card(run_folder, tmp_path, capfd):
    metrics, output = tmp_path / "metrics.json", tmp_path / "small"
    code, _, err = run(
        capfd, "sample/evaluate.py", "--tokenizer", run_folder / "tokenizer", "--data", "Emoji",
        "--count", 8, "--metrics", '["psnr"]', "--output", metrics,
    )  # fmt: skip
    assert code == 0, err
    code, out, _ = run(capfd, "vistok/cli.py", "scores", "--results", metrics)
    assert code == 0
    assert "| reconstruction | psnr" in out
    code, _, err = run(
        capfd, "vistok/cli.py", "export", "--checkpoint", run_folder, "--output", output,
        "--tokenizer_dtype", "float16", "--results", metrics, "--note", "A note.",
    )  # fmt: skip
    assert code == 0, err
    card = (output / "README.md").read_text()
    for expected in ("A note.", "| reconstruction | psnr", "train/generator.py", "32 images"):
        assert expected in card
    sizes = [
        sum(file.stat().st_size for file in (folder / "tokenizer").glob("*.safetensors"))
        for folder in (output, run_folder)
    ]
    assert sizes[0] < 0.7 * sizes[1]
    assert ImagePipeline.from_pretrained(output).generator.dtype.itemsize == 4
