"""Pictures to files of tokens and back by the commands, and their quality against size."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

from vistok import FSQ, VQ, ConvTokenizer, TiTok
from vistok.codec import file_size
from vistok.curves import FormatCurve
from vistok.data import Emoji

VISTOK = "vistok/cli.py"


@pytest.fixture(scope="module")
def ordered(tmp_path_factory) -> TiTok:
    """An untrained tokenizer of any length, and its directory."""
    torch.manual_seed(0)
    model = TiTok(
        VQ(100, 6),
        image_size=16,
        patch_size=4,
        num_latent_tokens=20,
        encoder_width=16,
        encoder_depth=1,
        encoder_heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
        tail_drop="uniform",
    )
    for p in model.parameters():  # so large that every token shows
        torch.nn.init.normal_(p, std=0.3)
    model.directory = tmp_path_factory.mktemp("ordered")
    model.save_pretrained(model.directory)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Directory of a tokenizer whose tokens decode as a whole."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    ConvTokenizer(
        FSQ((4, 4)),
        image_size=16,
        patch_size=4,
        channels=8,
        channel_multipliers=(1,),
        num_res_blocks=1,
        z_channels=8,
        attention=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path) -> Path:
    """A picture of 40 x 30 as it is looked at: stored on its side, with alpha."""
    path = tmp_path / "in.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = Emoji("held-out")[3].image.resize((30, 40)).convert("RGBA")
    image.putalpha(200)
    image.save(path, exif=exif)
    return path


def test_a_picture_becomes_a_file_and_a_picture_again(ordered, picture, tmp_path, capfd):
    code, out, err = run(capfd, VISTOK, "compress", picture, "--tokenizer", ordered.directory)
    assert code == 0, err
    assert "in.png, 40 x 30: 20 of 20 tokens, 40 bytes (18 of tokens)" in out
    assert "0.2667 bits per pixel, PSNR" in out
    file = tmp_path / "in.vtk"
    assert file.stat().st_size == file_size(ordered.spec, 20) == 40

    back, coarse, again = (tmp_path / f"{name}.png" for name in ("back", "coarse", "again"))
    by = ("--tokenizer", ordered.directory)
    code, out, err = run(capfd, VISTOK, "decompress", file, *by, "-o", back)
    assert code == 0, err
    assert "40 bytes: 20 tokens, 40 x 30" in out
    assert Image.open(back).size == (40, 30)

    # The first tokens of a file are those of a shorter file.
    code, _, err = run(capfd, VISTOK, "decompress", file, *by, "-o", coarse, "--tokens", 5)
    assert code == 0, err
    short = tmp_path / "new" / "short.vtk"
    code, out, err = run(capfd, VISTOK, "compress", picture, *by, "-o", short, "--tokens", 5)
    assert code == 0, err
    assert "5 of 20 tokens, 27 bytes" in out
    code, _, err = run(capfd, VISTOK, "decompress", short, *by, "-o", again)
    assert code == 0, err
    assert coarse.read_bytes() == again.read_bytes() != back.read_bytes()


def test_the_size_or_the_quality_may_be_given(ordered, picture, tmp_path, capfd):
    def compress(*options) -> tuple[int, float]:
        """Return (bytes, PSNR)."""
        by = ("--tokenizer", ordered.directory, "--output", tmp_path / "a.vtk")
        code, out, err = run(capfd, VISTOK, "compress", picture, *by, *options)
        assert code == 0, err
        return (tmp_path / "a.vtk").stat().st_size, float(out.split("PSNR ")[1].split(" dB")[0])

    for size in (23, 30, 39, 40, 1000):
        written, _ = compress("--bytes", size)
        assert written == max(s for n in range(1, 21) if (s := file_size(ordered.spec, n)) <= size)
    # The weights are random: quality does not rise with every token, yet is reached.
    target = sorted(compress("--tokens", n)[1] for n in (1, 6, 20))[1] - 0.05
    _, reached = compress("--psnr", target)
    assert reached >= target


def test_what_cannot_be_done_ends_in_one_line(ordered, whole, picture, tmp_path, capfd):
    out = tmp_path / "out.png"
    file = tmp_path / "in.vtk"
    code, *_ = run(capfd, VISTOK, "compress", picture, ordered.directory)
    assert code == 0
    damaged = tmp_path / "damaged.vtk"
    damaged.write_bytes(file.read_bytes()[:-1])
    cases = [
        (("compress", picture, ordered.directory, out, "--tokens", 21), "decodes from 1 to 20"),
        (("compress", picture, ordered.directory, out, "--bytes", 22), "the smallest file"),
        (("compress", picture, ordered.directory, out, "--psnr", 90), "90 dB is out of reach: the"),
        (("compress", picture, ordered.directory, out, "--tokens", 1, "--psnr", 9), "give one of"),
        (("compress", picture, whole, out, "--tokens", 3), "decodes from all 16"),
        (("compress", picture, whole, out, "--bytes", 29), "takes 30"),
        (("compress", picture, whole, out, "--psnr", 90), "at 16 tokens"),
        (("compress", file, ordered.directory, out), "in.vtk: not a picture"),
        (("compress", tmp_path / "no.png", ordered.directory, out), "no.png"),
        (("decompress", file, whole, out), "in.vtk: made by tokenizer"),
        (("decompress", file, ordered.directory, out, "--tokens", 21), "decodes from 1 to 20"),
        (("decompress", damaged, ordered.directory, out), "damaged.vtk: damaged or cut off"),
        (("decompress", picture, ordered.directory, out), "in.png: not a .vtk file"),
        (("decompress", tmp_path / "no.vtk", ordered.directory, out), "no.vtk: cannot be read"),
        (("decompress", file, ordered.directory, tmp_path / "out.jpg"), "written as .png"),
        (("decompress", file, ordered.directory), "out"),
        (("rate_distortion", tmp_path), "did you mean 'rate-distortion'"),
        (("rate-distortion", tmp_path / "no", whole, out), "no"),
        (("rate-distortion", "Emoji", whole, out, "--lengths", "1,2"), "decodes from all 16"),
        (("rate-distortion", "Emoji", whole, out, "--batch_size", 0), "at least 1"),
    ]
    for command, expected in cases:
        code, _, err = run(capfd, VISTOK, *command)
        last = err.strip().splitlines()[-1]
        assert code == 2, command
        assert last.startswith("error: "), command
        assert expected in last, (command, last)
        assert not out.exists()


def test_rate_and_distortion_beside_other_formats(ordered, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(FormatCurve, "QUALITIES", (95,))
    pictures, out = tmp_path / "pictures", tmp_path / "rd"
    pictures.mkdir()
    for i in range(3):
        Emoji("held-out")[i].image.save(pictures / f"{i}.png")
    code, printed, err = run(
        capfd, VISTOK, "rate-distortion", pictures, "--tokenizer", ordered.directory, "-o", out,
        "--features", "random", "--lengths", "20,1",
    )  # fmt: skip
    assert code == 0, err
    assert "resize-center-crop at 16 px" in printed
    rows = list(csv.DictReader((out / "curve.csv").open()))
    ours = [row for row in rows if row["codec"] == "TiTok"]
    assert [(r["setting"], r["bytes"]) for r in ours] == [("1", "23.0"), ("20", "40.0")]
    assert {row["codec"] for row in rows} == {"TiTok", "JPEG", "WebP"}
    assert all(float(row["rfid"]) > 0 and float(row["psnr"]) > 0 for row in rows)
    matched = list(csv.DictReader((out / "matched.csv").open()))
    for row in matched:
        fitting = [
            r for r in rows if r["codec"] == "WebP" and float(r["bytes"]) <= float(row["bytes"])
        ]
        best = max(fitting, key=lambda r: float(r["bytes"]), default={"bytes": ""})
        assert row["WebP_bytes"] == best["bytes"]
    results = json.loads((out / "metrics.json").read_text())
    assert results["JPEG 95"]["subject"]["subsampling"] == "4:2:0"
    assert "not comparable" in results["TiTok 1"]["protocol"]["features"]
    assert Image.open(out / "curve.png").format == "PNG"


def test_reconstructions_by_length(ordered, tmp_path, capfd):
    output = tmp_path / "grid.png"
    common = ("--tokenizer", ordered.directory, "--count", 5, "--columns", 3, "--output", output)
    code, _, err = run(
        capfd, "sample/reconstruct.py", *common, "--lengths", "1,4,20", "--curve_images", 6,
        "--features", "none",
    )  # fmt: skip
    assert code == 0, err
    by_length = np.asarray(Image.open(output))
    rows = list(csv.DictReader((tmp_path / "grid-curve.csv").open()))
    assert [row["setting"] for row in rows] == ["1", "4", "20"]
    assert set(rows[0]) >= {"psnr", "ssim", "payload_bytes"}
    assert "rfid" not in rows[0]
    assert (tmp_path / "grid-curve.png").exists()
    assert len(json.loads((tmp_path / "grid-curve.json").read_text())) == 3

    # Without lengths: two rows to a block in place of four, and no curve.
    for file in tmp_path.glob("grid-curve.*"):
        file.unlink()
    code, _, err = run(capfd, "sample/reconstruct.py", *common)
    assert code == 0, err
    whole = np.asarray(Image.open(output))
    assert by_length.shape[0] - 8 == 2 * (whole.shape[0] - 8)
    assert not list(tmp_path.glob("grid-curve.*"))
