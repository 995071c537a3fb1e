"""Curves hold what the evaluation of one length says, of every length."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image

from vistok import VQ, Noise, TiTok, Tokenizer, TokenSpec
from vistok import metrics as m
from vistok.codec import file_size
from vistok.curves import (
    FormatCurve,
    Scoring,
    TokenizerCurve,
    decode_first,
    measure,
    plot,
    read_lengths,
    write_results,
    write_table,
)
from vistok.data import Emoji, Transform, to_uint8
from vistok.errors import UserError

ROOT = Path(__file__).parents[1]
COUNT = 10


class Colours(torch.nn.Module):
    """Features of 27 dimensions, whose distances take no time."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return (self.scale * F.adaptive_avg_pool2d(images / 255, 3).flatten(1),)


@pytest.fixture(scope="module", autouse=True)
def colours():
    load = m.load_features
    network = m.FeatureNetwork(Colours(), "colours")

    def replaced(name, weights=None):
        return network if name == "random" else load(name, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "load_features", replaced)
        yield


@pytest.fixture(scope="module")
def model() -> TiTok:
    torch.manual_seed(0)
    model = TiTok(
        VQ(100, 6),
        image_size=16,
        patch_size=4,
        num_latent_tokens=8,
        encoder_width=16,
        encoder_depth=1,
        encoder_heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
        tail_drop="uniform",
    ).eval()
    for p in model.parameters():  # so large that every token shows
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def scoring(colours) -> Scoring:
    pictures = m.Pictures(Emoji("held-out"), Transform("resize-center-crop", 16), COUNT)
    return Scoring.load(pictures, "random", None, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def points(model, scoring):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FormatCurve, "QUALITIES", (0, 40, 95))
        curves = [TokenizerCurve(scoring, model, [1, 4, 8]), FormatCurve(scoring, "JPEG")]
    return measure(Accelerator(cpu=True), scoring, curves, batch_size=4, num_workers=0)


def test_points_are_those_of_each_length_alone(model, scoring, points):
    originals = torch.stack([scoring.pictures[i][1] for i in range(COUNT)])
    indices = torch.arange(COUNT)
    tokens = model.encode(originals / 255)
    reference = scoring.collector("originals")
    reference.update(indices, originals)
    for point, length in zip(points[:3], (1, 4, 8), strict=True):
        made = to_uint8(model.decode(tokens[:, :length]))
        collector = scoring.collector("made")
        collector.update(indices, made)
        moments = [(s.mean, s.covariance) for s in (collector.reduce(), reference.reduce())]
        expected = {
            "psnr": m.psnr(made / 255, originals / 255).mean().item(),
            "ssim": m.ssim(made / 255, originals / 255).mean().item(),
            "rfid": m.frechet_distance(*moments[0], *moments[1]),
        }
        assert (point.codec, point.setting) == ("TiTok", length)
        # In other batches a pixel may round to its neighbour.
        assert point.scores == pytest.approx(expected, rel=1e-3)
        assert point.bytes == file_size(model.spec, length) == 22 + point.payload
        assert point.bits_per_pixel == pytest.approx(8 * point.bytes / 256)
        assert len(point.notes) == 1


def test_a_format_is_scored_from_its_files(scoring, points):
    point = points[-1]
    assert (point.codec, point.setting, point.payload) == ("JPEG", 95, None)
    sizes, scores = [], []
    for i in range(COUNT):
        original = scoring.pictures[i][1]
        file = io.BytesIO()
        options = {"quality": 95, "optimize": True, "subsampling": "4:2:0"}
        Image.fromarray(original.permute(1, 2, 0).numpy()).save(file, "JPEG", **options)
        made = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8)
        pair = made.view(16, 16, 3).permute(2, 0, 1)[None] / 255, original[None] / 255
        sizes.append(len(file.getvalue()))
        scores.append(m.psnr(*pair).item())
    assert point.bytes == pytest.approx(sum(sizes) / COUNT)
    assert point.scores["psnr"] == pytest.approx(sum(scores) / COUNT)
    sizes = [p.bytes for p in points if p.codec == "JPEG"]
    assert sizes == sorted(sizes)


def test_one_length_is_what_evaluate_says(model, scoring, points, tmp_path):
    """The same protocol word for word, and the same scores."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "sample" / "evaluate.py")
    evaluate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evaluate)
    model.save_pretrained(tmp_path / "tokenizer")
    output = tmp_path / "metrics.json"
    evaluate.main(
        tokenizer=str(tmp_path / "tokenizer"),
        data=Emoji("held-out"),
        count=COUNT,
        features="random",
        metrics=["fid", "psnr", "ssim"],
        output=str(output),
    )
    write_results(output, scoring.protocol, points)
    results = json.loads(output.read_text())
    theirs, ours = results["reconstruction"], results["TiTok 8"]
    assert ours["protocol"] == theirs["protocol"]
    assert ours["subject"]["fingerprint"] == theirs["subject"]["fingerprint"]
    assert ours["notes"] == theirs["notes"]
    assert {k: ours["scores"][k] for k in theirs["scores"]} == pytest.approx(
        theirs["scores"], rel=1e-3
    )


def test_noise_is_that_of_the_picture_at_every_length():
    class Drawing(Tokenizer):
        spec = TokenSpec.ids((6,), 8, ordered=True)

        def decode(self, tokens, lengths=None, text=None, noise=None):
            seen.append(tokens.shape[1])
            return noise.normal(2)

    seen: list[int] = []
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    draws = [decode_first(Drawing(), tokens, n, 3, torch.tensor([5, 9])) for n in (1, 6)]
    assert seen == [1, 6]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], Noise(3, [5, 9]).normal(2))


def test_lengths_are_read():
    ordered = TokenSpec.ids((12,), 8, ordered=True)
    assert read_lengths(None, ordered) == [1, 2, 4, 8, 12]
    assert read_lengths("8, 2,2", ordered) == [2, 8]
    assert read_lengths([3], ordered) == [3]
    assert read_lengths(None, TokenSpec.ids((2, 3), 8)) == [6]
    for wrong, message in (("1;2", "as 1,2,4,8"), ("13", "1 to 12"), ([0], "1 to 12")):
        with pytest.raises(UserError, match=message):
            read_lengths(wrong, ordered)
    with pytest.raises(UserError, match="all 6"):
        read_lengths("2", TokenSpec.ids((2, 3), 8))


def test_networks_without_weights_are_left_out_unless_named(scoring, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cpu = torch.device("cpu")
    left = Scoring.load(scoring.pictures, None, None, None, cpu)
    assert left.lpips is left.network is None
    assert left.protocol.features == left.protocol.reference == "none"
    for named in ({"features": "inception"}, {"feature_weights": "no.pth"}, {"lpips_weights": "x"}):
        options = {"features": None, "feature_weights": None, "lpips_weights": None} | named
        with pytest.raises(UserError, match=r"inception|no\.pth|VGG-16"):
            Scoring.load(scoring.pictures, **options, device=cpu)


def test_tables_and_plots(points, tmp_path):
    write_table(tmp_path / "new" / "a.csv", [point.row() for point in points])
    lines = (tmp_path / "new" / "a.csv").read_text().splitlines()
    assert lines[0] == "codec,setting,bytes,payload_bytes,bits_per_pixel,psnr,ssim,rfid"
    assert lines[1].startswith("TiTok,1,23.0,1,0.71875,")
    assert len(lines) == 1 + len(points)
    plot(tmp_path / "a.png", points, "bytes", "title")
    plot(tmp_path / "b.png", points[:3], "tokens", "title")
    assert Image.open(tmp_path / "a.png").width > Image.open(tmp_path / "a.png").height
    assert Image.open(tmp_path / "b.png").format == "PNG"
