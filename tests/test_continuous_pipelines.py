"""Fresh models of continuous tokens under an autoencoder: pictures, whatever the precision."""

import pytest
import torch

from vistok import XAR, ImagePipeline
from vistok.commands.info import describe
from vistok.decoding import Decoding, Sampler, Schedule
from vistok.generators import MAR, FlowAR
from vistok.heads import DiffusionHead, DimensionWiseHead, FlowHead, FlowTransformerHead
from vistok.quantizers import DimensionWise, Gaussian
from vistok.tokenizers import KLAutoencoder, KLTokenizer

SIZES = {"dim": 32, "depth": 1, "num_heads": 2}
SMALL = {"width": 32, "depth": 1}
GENERATORS = {
    "MAR": (MAR, {"head": DiffusionHead(**SMALL), "buffer": 2}),
    "MAR, flow": (MAR, {"head": FlowHead(**SMALL), "buffer": 2}),
    "TokenBridge": (MAR, {"head": DimensionWiseHead(num_heads=2, **SMALL), "buffer": 2}),
    "xAR": (XAR, {"order": "cells(2)"}),
    "FlowAR": (FlowAR, {"head": FlowTransformerHead(64, 1), "scales": (1, 2, 4)}),
}
ANNEALED = {
    "MAR": Decoding(steps=Schedule("linear(20,5)"), sampler=Sampler("ddpm(950)")),
    "xAR": Decoding(steps=Schedule("linear(9,4)")),
    "FlowAR": Decoding(steps=Schedule("linear(9,4)"), sampler=Sampler("flowar(0.9)")),
}


def tokenizer(levels: int | None) -> KLTokenizer:
    quantizer = DimensionWise(3, levels) if levels else Gaussian(3)
    vae = KLAutoencoder(3, [8, 8], layers_per_block=1, norm_groups=4, scaling_factor=0.2325)
    return KLTokenizer(quantizer, vae, 8)


def pipeline(name: str) -> ImagePipeline:
    """The pair as it is before training: weights as they are initialised."""
    torch.manual_seed(0)
    images = tokenizer(16 if name == "TokenBridge" else None)
    family, arguments = GENERATORS[name]
    return ImagePipeline(images, family(images.spec, ["a", "b"], **SIZES, **arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GENERATORS)
def test_a_fresh_pipeline_makes_finite_pictures(name, dtype):
    pair = pipeline(name)
    for decoding in (None, ANNEALED.get(name)):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            # `sample` refuses pictures that are not finite.
            images = pair.sample(torch.tensor([0, 1, 1]), 0, range(3), decoding)
        assert images.shape == (3, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("MAR", list(range(20, 4, -1))),
        ("xAR", [9, 7, 5, 4]),
        ("FlowAR", [8, 6, 4]),  # of 9 steps the released grid takes 8
    ],
)
def test_calls_follow_annealed_steps(name, calls):
    generator, decoding = pipeline(name).generator, ANNEALED[name]
    assert decoding.calls(decoding.plan_of(generator), generator.head) == calls


@pytest.mark.parametrize("name", GENERATORS)
def test_info_describes_every_plan(name, capsys):
    generator = pipeline(name).generator
    describe(generator)
    text = capsys.readouterr().out
    assert all(f"plan         {order}" in text for order in generator.orders)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_pair_is_saved_with_how_it_decodes(name, tmp_path):
    pair = pipeline(name)
    pair.decoding = ANNEALED.get(name, pair.decoding)
    pair.save_pretrained(tmp_path)
    loaded = ImagePipeline.from_pretrained(tmp_path)
    assert loaded.decoding == pair.decoding
    drawn = [p(class_labels=["b"], seed=3).images[0].tobytes() for p in (pair, loaded)]
    assert drawn[0] == drawn[1]
