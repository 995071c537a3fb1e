"""The configs of published models: every one builds, and has the published number of weights."""

from pathlib import Path

import pytest
import torch
import yaml

import vistok
from vistok.decoding import Decoding
from vistok.tokens import TokenSpec
from vistok.training import OptimizerConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "generators"
PUBLISHED = {  # exact where the papers or files give exact numbers, otherwise to their digits
    "llamagen_b_256": 110_888_448,
    "llamagen_l_384": 342_910_976,
    "llamagen_xl_384": 774_699_520,
    "llamagen_xxl_384": 1_410_972_672,
    "llamagen_3b_384": 3_096_659_200,
    "llamagen_xl_t2i_512": 777.7e6,
    "par_xl_4x_384": 774_699_520 + 3 * 1280,
    "par_3b_16x_384": 3_096_659_200 + 15 * 3200,
    "nar_b_256": 130.6e6,
    "nar_m_256": 295.5e6,
    "nar_l_256": 372.5e6,
    "nar_xl_256": 816.0e6,
    "nar_xxl_256": 1464.5e6,
    "nar_l_video": 368.7e6,
    "nar_lp_video": 693.6e6,
    "nar_xl_t2i_512": 819.0e6,
}
SIDES = {"256": 16, "384": 24, "512": 32}


def build(name: str, config: dict):
    if "emoji" in name:
        spec, classes = TokenSpec.ids((8, 8), 4096), 9
    elif "video" in name:
        spec, classes = TokenSpec.ids((4, 16, 16), 8192), 101
    else:
        side = SIDES[name.split("_")[-1]]
        spec, classes = TokenSpec.ids((side, side), 16384), 1000
    family = getattr(vistok, config["generator"]["class_path"])
    with torch.device("meta"):
        return family(spec, [str(i) for i in range(classes)], **config["generator"]["init_args"])


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.stem)
def test_config(file):
    config = yaml.safe_load(file.read_text())
    model = build(file.stem, config)
    count = sum(p.numel() for p in model.parameters())
    expected = PUBLISHED.get(file.stem)
    if isinstance(expected, int):
        assert count == expected
    elif expected:
        assert count == pytest.approx(expected, abs=0.06e6)
    optimizer = {k: tuple(v) if isinstance(v, list) else v for k, v in config["optimizer"].items()}
    OptimizerConfig(**optimizer).learning_rate(0, 100)
    decoding = config.get("decoding", {})
    Decoding(**{k: v if k == "top_k" else vistok.Schedule(v) for k, v in decoding.items()})
    assert config["images"] >= config["batch_size"]


def test_every_published_size_has_its_config():
    names = {file.stem for file in CONFIGS.glob("*.yaml")}
    assert set(PUBLISHED) <= names
