"""The configs of published models: every one builds, and has the published number of weights."""

import dataclasses
import inspect
import runpy
from pathlib import Path

import pytest
import torch
import yaml

import vistok
from vistok.losses import TokenizerLoss
from vistok.tokenizers import Tokenizer
from vistok.training import OptimizerConfig, RunConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "tokenizers"
ARGUMENTS = inspect.signature(runpy.run_path(str(ROOT / "train" / "tokenizer.py"))["main"])
# All weights, exactly; or millions of the encoder's, the decoder's and all (those of a stage 1
# without the VQGAN that it looks at).
PUBLISHED = {
    "vq16": 71_883_403,
    "vq8": 70_109_835,
    "kl16": 66_456_019,
    "titok_s128_stage1": (25.8, 27.0, None),
    "titok_s128_stage2": (25.8, 27.0, 83.7),
    "titok_b64_stage1": (85.9, 88.1, None),
    "titok_b64_stage2": (85.9, 88.1, 204.8),
    "titok_l32_stage1": (303.4, 306.8, None),
    "titok_l32_stage2": (303.4, 306.8, 641.1),
    "titok_bl64_vq": (85.9, 303.5, 390.0),
    "titok_bl128_vq": (86.0, 303.6, 390.2),
    "titok_sl256_vq": (25.9, 303.7, 330.3),
    "titok_ll32_vae": (303.4, 303.4, 606.9),
    "titok_bl64_vae": (85.9, 303.5, 389.4),
    "titok_bl128_vae": (86.0, 303.5, 389.6),
    "tatitok_bl32_vq": (85.9, None, None),
    "tatitok_bl64_vq": (85.9, None, None),
    "tatitok_bl128_vq": (86.0, 304.4, 391.1),
    "tatitok_bl32_vae": (85.9, 304.3, 390.2),
    "tatitok_bl64_vae": (85.9, None, None),
    "tatitok_sl128_vae": (25.8, 304.4, 330.3),
    "one_d_piece_s256_stage1": (25.9, 27.1, None),
    "one_d_piece_s256_stage2": (25.9, 27.1, 83.9),
    "one_d_piece_b256_stage1": (86.0, 88.2, None),
    "one_d_piece_b256_stage2": (86.0, 88.2, 205.3),
    "one_d_piece_l256_stage1": (303.6, 307.1, None),
    "one_d_piece_l256_stage2": (303.6, 307.1, 641.7),
    "maskgit_vqgan": (23.8, 30.5, 54.5),
    "tokenflow_b": (29.3, 42.5, 181.9),
    "tokenflow_b_enhanced_stage2": (29.3, 237.1, 376.6),
    "tokenflow_xl": (29.3, 42.5, 523.5),  # without the 30.5 million that nothing reads
}


def build(value):
    """Return what a config's classes make, recursively."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = {k: build(v) for k, v in value.get("init_args", {}).items()}
        return getattr(vistok, value["class_path"])(**arguments)
    return value


def weights(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.stem)
def test_config(file):
    config = yaml.safe_load(file.read_text())
    ARGUMENTS.bind(**config)
    for options in (config["optimizer"], config.get("discriminator_optimizer", {})):
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        OptimizerConfig(**tuples).learning_rate(0, 100)
    assert config.get("loss", {}).keys() <= inspect.signature(TokenizerLoss).parameters.keys()
    assert config.get("run", {}).keys() <= {f.name for f in dataclasses.fields(RunConfig)}
    assert config["images"] >= config["batch_size"]
    with torch.device("meta"):
        model = build(config["tokenizer"])
    assert isinstance(model, Tokenizer)
    expected = PUBLISHED.get(file.stem)
    if isinstance(expected, int):
        assert weights(model) == expected
    elif expected:
        for part, millions in zip((model.encoder, model.decoder, model), expected, strict=True):
            if millions is not None:
                assert weights(part) == pytest.approx(millions * 1e6, abs=0.06e6)


def test_every_published_size_has_its_config():
    names = {file.stem for file in CONFIGS.glob("*.yaml")}
    assert set(PUBLISHED) <= names
