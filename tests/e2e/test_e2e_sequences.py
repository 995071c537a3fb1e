"""The journeys of 1-D tokenizers, by the real commands in tiny form: two stages, any length, text,
and masked and randomised generators over their tokens."""

import csv
import json
from pathlib import Path

import pytest
import torch
from commands import run
from PIL import Image

from vistok import ImagePipeline, Tokenizer
from vistok.errors import UserError

COMMON = """
data: {class_path: Emoji, init_args: {split: held-out}}
validation: {class_path: Emoji, init_args: {split: held-out}}
transform: random-flip
images: 16
batch_size: 8
run: {num_workers: 0, validation_images: 8}
"""
VQGAN = """
tokenizer:
  class_path: MaskGITVQGAN
  init_args:
    image_size: 16
    channels: 8
    channel_multipliers: [1, 1, 1]
    num_res_blocks: 1
    quantizer: {class_path: VQ, init_args: {vocab_size: 24, dim: 8, l2_normalise: false}}
"""
WIDTHS = """
    image_size: 16
    patch_size: 4
    num_latent_tokens: 8
    tail_drop: uniform
    encoder_width: 16
    encoder_depth: 1
    encoder_heads: 2
    decoder_width: 16
    decoder_depth: 1
    decoder_heads: 2
"""
TWO_STAGE = f"""
tokenizer:
  class_path: TwoStageTiTok
  init_args:{WIDTHS}
    num_proxy_codes: 24
    vqgan_channels: 8
    vqgan_channel_multipliers: [1, 1, 1]
    vqgan_res_blocks: 1
    vqgan_dim: 8
    quantizer: {{class_path: VQ, init_args: {{vocab_size: 32, dim: 4}}}}
"""
ONE_STAGE = f"""
tokenizer:
  class_path: TiTok
  init_args:{WIDTHS}
    quantizer: {{class_path: FSQ, init_args: {{levels: [4, 4, 4]}}}}
"""
GENERATOR = """
generator: {class_path: %s, init_args: {dim: 16, depth: 2, num_heads: 2}}
transform: resize-center-crop
data: {class_path: Emoji, init_args: {split: held-out}}
images: 16
batch_size: 8
run: {num_workers: 0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("sequences")
    for name, config in {"vqgan": VQGAN, "two-stage": TWO_STAGE, "one-stage": ONE_STAGE}.items():
        (made / f"{name}.yaml").write_text(config + COMMON)
    return made


@pytest.fixture
def train(capfd, folder):
    """Train a tokenizer unless it is there, and return its directory."""

    def trained(config: str, name: str, *more: object) -> Path:
        output = folder / name
        if not output.exists():
            options = ("--config", folder / f"{config}.yaml", "--output", output)
            code, _, err = run(capfd, "train/tokenizer.py", *options, *more)
            assert code == 0, err
        return output

    return trained


def last_line(run_folder: Path) -> dict:
    return json.loads((run_folder / "log.jsonl").read_text().splitlines()[-1])


def test_two_stages(train):
    vqgan = train("vqgan", "vqgan")
    first = train("two-stage", "stage1", "--initial", vqgan)
    second = train("two-stage", "stage2", "--initial", first, "--tokenizer.init_args.stage", 2)
    log = last_line(first)
    assert log["proxy"] > 0 and "reconstruction" not in log
    assert log["validation/psnr"] > 0 and log["validation/psnr_2"] > 0
    assert "proxy" not in last_line(second) and last_line(second)["reconstruction"] > 0

    vqgan, first, second = (Tokenizer.from_pretrained(path) for path in (vqgan, first, second))
    one, two = first.state_dict(), second.state_dict()
    assert {k.removeprefix("vqgan."): v for k, v in one.items() if "vqgan" in k}.keys() == (
        vqgan.state_dict().keys()
    )
    for name, tensor in vqgan.state_dict().items():
        assert torch.equal(one[f"vqgan.{name}"], tensor), "frozen in the first stage"
    for name in ("latent_tokens", "encoder.proj_out.weight", "quantizer.embedding.weight"):
        assert torch.equal(one[name], two[name]), "frozen in the second"
    for name in ("decoder.mask_token", "vqgan.decoder.conv_out.weight"):
        assert not torch.equal(one[name], two[name]), "finetuned in the second"
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(first.eval().encode(images), second.eval().encode(images))


def test_a_stage_starts_from_the_one_before(train, folder, capfd):
    options = ("--config", folder / "two-stage.yaml", "--output", folder / "wrong")
    code, _, err = run(
        capfd, "train/tokenizer.py", *options, "--initial", train("one-stage", "one-stage")
    )
    assert code == 2
    assert "start from" in err and err.strip().count("\n") == 0


def test_quality_by_length(train, tmp_path, capfd):
    grid, tokenizer = tmp_path / "grid.png", train("one-stage", "one-stage")
    code, _, err = run(
        capfd, "sample/reconstruct.py", "--tokenizer", tokenizer,
        "--lengths", "1,2,8", "--count", 4, "--columns", 4, "--curve_images", 12,
        "--features", "random", "--output", grid,
    )  # fmt: skip
    assert code == 0, err
    with open(tmp_path / "grid-curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == ["1", "2", "8"]
    assert all(float(row["psnr"]) > 0 and float(row["rfid"]) >= 0 for row in rows)
    assert Image.open(grid).height > 4 * 64 and (tmp_path / "grid-curve.png").exists()

    for length, expected in ((2, 0), (9, 2)):
        code, _, err = run(
            capfd, "sample/evaluate.py", "--tokenizer", tokenizer, "--data", "Emoji",
            "--count", 8, "--metrics", '["psnr"]', "--length", length,
            "--output", tmp_path / "metrics.json",
        )  # fmt: skip
        assert code == expected, err
    assert "decodes from 1 to 8 tokens" in err


@pytest.mark.parametrize(
    ("family", "plan", "passes"),
    [("MaskGIT", "maskgit(3)", 3), ("RAR", "raster", 8), ("LlamaGen", "raster", 8)],
)
def test_generators_over_a_sequence(train, folder, tmp_path, capfd, family, plan, passes):
    tokenizer, output = train("one-stage", "one-stage"), folder / family / "generator"
    config = tmp_path / "generator.yaml"
    config.write_text(GENERATOR % family)
    code, _, err = run(
        capfd, "train/generator.py", "--config", config, "--tokenizer", tokenizer,
        "--output", output, "--decoding.plan", plan,
    )  # fmt: skip
    assert code == 0, err
    (folder / family / "tokenizer").symlink_to(tokenizer)
    sample = ("sample/generate.py", "--checkpoint", folder / family, "--count", 9)
    code, out, err = run(capfd, *sample, "--output", tmp_path / "samples")
    assert code == 0, err
    assert f"{passes} passes an image" in out
    code, out, err = run(capfd, "vistok/cli.py", "info", folder / family)
    assert code == 0 and f"{family}:" in out, err
    code, out, err = run(capfd, *sample, "--length", 3, "--output", tmp_path / "short")
    if family == "MaskGIT":
        assert code == 2 and err.strip().count("\n") == 0
    else:
        assert code == 0 and "3 passes an image" in out, err


def test_a_decoder_that_reads_captions(train, folder, clip, tmp_path, capfd):
    options = ("--tokenizer.init_args.text_length", 8, "--tokenizer.init_args.text_dim", 16)
    code, _, err = run(
        capfd, "train/tokenizer.py", "--config", folder / "one-stage.yaml", *options,
        "--output", tmp_path / "blind",
    )  # fmt: skip
    assert code == 2 and "names no CLIP" in err
    tokenizer = train("one-stage", "text-aware", *options, "--text_encoder", clip)
    model = Tokenizer.from_pretrained(tokenizer).eval()
    tokens = model.encode(torch.rand(2, 3, 16, 16))
    with pytest.raises(UserError, match="got no text"):
        model.decode(tokens)
    code, _, err = run(
        capfd, "sample/evaluate.py", "--tokenizer", tokenizer, "--data", "Emoji", "--count", 8,
        "--metrics", '["psnr"]', "--output", tmp_path / "metrics.json",
    )  # fmt: skip
    assert code == 0, err

    config = tmp_path / "generator.yaml"
    config.write_text(GENERATOR % "LlamaGen")
    output = tmp_path / "pair"
    code, _, err = run(
        capfd, "train/generator.py", "--config", config, "--tokenizer", tokenizer,
        "--output", output / "generator",
    )  # fmt: skip
    assert code == 0, err
    (output / "tokenizer").symlink_to(tokenizer)
    pipeline = ImagePipeline.from_pretrained(output)
    labels = torch.tensor([0, 5, 3])
    together = pipeline.sample(labels, 1, range(3))
    alone = pipeline.sample(labels[1:2], 1, [1])
    assert torch.allclose(alone[0], together[1], atol=1e-5)
