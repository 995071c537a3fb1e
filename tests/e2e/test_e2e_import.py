"""From a published file to pictures: import, info, and sampling by another plan."""

import argparse
import re

import pytest
import torch
from commands import run
from PIL import Image

from vistok.generators import LlamaGen
from vistok.quantizers import VQ
from vistok.tokenizers import ConvTokenizer
from vistok.tokens import TokenSpec


def publish_tokenizer(file):
    """Save a tiny tokenizer under LlamaGen's names, in its layout."""
    model = ConvTokenizer(VQ(24, 4), 16, 16, [1, 1, 1], num_res_blocks=1, z_channels=8)
    names = {}
    for name, tensor in model.state_dict().items():
        side = "down" if name.startswith("encoder") else "up"
        name = name.replace("quantizer.", "quantize.").replace(".resample.", f".{side}sample.")
        names[name] = tensor
    names["quantize.codebook_used"] = torch.zeros(65536)
    torch.save({"model": names, "steps": 7, "args": argparse.Namespace(lr=1e-4)}, file)


def publish_generator(file):
    model = LlamaGen(TokenSpec.ids((4, 4), 24), ["a", "b", "c"], dim=64, depth=2, num_heads=4)
    torch.nn.init.normal_(model.head.linear.weight)
    names = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in [
            (r"^condition\.", "cls_embedding.embedding_table."),
            (r"^token_embedding\.", "tok_embeddings."),
            (r"^blocks\.", "layers."),
            (r"attention\.qkv", "attention.wqkv"),
            (r"attention\.out", "attention.wo"),
            (r"feed_forward\.out", "feed_forward.w2"),
            (r"feed_forward_norm", "ffn_norm"),
            (r"^head\.linear", "output"),
        ]:
            name = re.sub(ours, theirs, name)
        if name.endswith("gate_value.weight"):
            for w, half in zip(("w1", "w3"), tensor.chunk(2), strict=True):
                names[name.replace("gate_value", w)] = half.clone()
        else:
            names[name] = tensor
    torch.save(names, file)  # flat, as the larger models are published


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    publish_tokenizer(folder / "vq.pt")
    publish_generator(folder / "c2i.pt")
    return folder


def test_import_info_and_sampling(imported, tmp_path, capfd):
    out = tmp_path / "pair"
    code, text, err = run(
        capfd, "vistok/cli.py", "import", "llamagen", imported / "vq.pt", "--output", out,
        "--options.image_size", 16,
    )  # fmt: skip
    assert code == 0, err
    assert "ConvTokenizer" in text
    generator = ("import", "llamagen", imported / "c2i.pt", "--output", out, "--guidance", 3)
    options = ("--options.shape", "[4,4]", "--options.num_heads", 4)
    code, text, err = run(capfd, "vistok/cli.py", *generator, *options)
    assert code == 0, err
    assert "LlamaGen" in text

    code, text, err = run(capfd, "vistok/cli.py", "info", out)
    assert code == 0, err
    for expected in (
        "raster, 16 passes",
        "zipar(s) for windows s from 1 (10 passes) to 4 (16)",
        "fits         generators of 4x4 ids of 24",
        "head         CategoricalHead",
    ):
        assert expected in text

    pictures = {}
    for plan, passes in (
        ("raster", 16),
        ("zipar(2)", 12),
        ("zipar(4)", 16),
        ("zipar(1,masked)", 10),
    ):
        folder = tmp_path / f"samples-{plan}"
        code, text, err = run(
            capfd, "sample/generate.py", "--checkpoint", out, "--output", folder, "--count", 6,
            "--plan", plan,
        )  # fmt: skip
        assert code == 0, err
        assert f"{passes} passes" in text
        pictures[plan] = [Image.open(f).tobytes() for f in sorted(folder.glob("*.png"))]
    assert pictures["zipar(4)"] == pictures["raster"]
    assert pictures["zipar(2)"] != pictures["raster"]
    code, _, err = run(
        capfd, "sample/generate.py", "--checkpoint", out, "--output", tmp_path / "adaptive",
        "--count", 3, "--plan", "zipar(2,adaptive)",
    )  # fmt: skip
    assert code == 0, err
    assert len(list((tmp_path / "adaptive").glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--options.image_size", 15), "must be divisible by 4"),
        (("--options.channels", 3), "channels"),
        (("--entries", '["ema"]'), "expected tensors by name"),
    ],
)
def test_wrong_options_of_an_import(imported, tmp_path, capfd, arguments, message):
    out = tmp_path / "pair"
    code, _, err = run(
        capfd,
        "vistok/cli.py",
        "import",
        "llamagen",
        imported / "vq.pt",
        "--output",
        out,
        *arguments,
    )
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0
    assert not out.exists()


def test_a_plan_that_does_not_fit_is_refused(imported, tmp_path, capfd):
    generator = ("import", "llamagen", imported / "c2i.pt", "--output", tmp_path / "pair")
    options = ("--options.shape", "[4,4]", "--options.num_heads", 4)
    code, _, err = run(capfd, "vistok/cli.py", *generator, *options, "--plan", "par(4)")
    assert code == 2
    assert "decodes by raster or zipar(s), not by par(4)" in err
    code, _, err = run(capfd, "vistok/cli.py", *generator, *options, "--plan", "zigzag")
    assert code == 2
    assert "none of raster" in err
