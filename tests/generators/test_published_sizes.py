"""The configs of published models: every one builds, and has the published number of weights."""

from pathlib import Path

import pytest
import torch
import yaml

import vistok
from vistok.decoding import Decoding
from vistok.quantizers import VQ, MultiScale
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
    "retok_b": 110_888_448 + 257 * 768,
    "retok_l": 342_910_976 + 257 * 1024,
    "retok_xl": 774_699_520 + 257 * 1280,
    "retok_xxl": 1_410_972_672 + 257 * 1536,
    # Theirs hold one more type vector, which no row has, and another that ours adds to positions.
    "maskgit_titok_l32": 177.2e6,
    "maskgit_titok_b64": 177.2e6,
    "maskgit_titok_s128": 295.0e6,
    "maskgit_one_d_piece_s256": 177.4e6,
    "maskgit_one_d_piece_b256": 177.4e6,
    "maskgit_one_d_piece_l256": 177.4e6,
    # Theirs hold 1022, 1024 and 99 rows more in three tables, and one of a mask.
    "rar_b": 260.9e6 - 2146 * 768,
    "rar_l": 461.7e6 - 2146 * 1024,
    "rar_xl": 955.4e6 - 2146 * 1280,
    "rar_xxl": 1498.5e6 - 2146 * 1408,
    "mar_b": 207.9e6,
    "mar_l": 478.3e6,
    "mar_l_400ep": 426.4e6,
    "mar_h": 942.4e6,
    "xar_b": 172.6e6,
    "xar_l": 608.4e6,
    "xar_h": 1186.0e6,
    "flowar_s": 171.7e6,
    # Published as 589 M and 1.9 B.
    "flowar_l": 586.9e6,
    "flowar_h": 1913.3e6,
    "tokenbridge_b": 218.0e6,
    "tokenbridge_l": 486.9e6,
    "tokenbridge_h": 910.0e6,
    # Theirs hold no codes: ours do, and the convolutions that smooth these.
    **{
        name: millions * 1e6 + 4096 * 32 + 4 * (9 * 32 + 1) * 32
        for name, millions in (
            ("var_d16", 310.3),
            ("var_d20", 600.9),
            ("var_d24", 1033.4),
            ("var_d30", 2010.0),
            ("var_d36_s", 2353.9),
        )
    },
}
KL16 = TokenSpec.latents((16, 16), 16)
IMAGENET = {  # tokens of the models whose name begins so; the last part of others' is their size
    "retok": TokenSpec.ids((256,), 16384, ordered=True),
    "maskgit_titok_l32": TokenSpec.ids((32,), 4096),
    "maskgit_titok_b64": TokenSpec.ids((64,), 4096),
    "maskgit_titok_s128": TokenSpec.ids((128,), 4096),
    "maskgit_one_d_piece": TokenSpec.ids((256,), 4096, ordered=True),
    "rar": TokenSpec.ids((16, 16), 1024),
    "flexar": TokenSpec.ids((256,), 64000, ordered=True),
    **dict.fromkeys(("mar", "xar", "flowar"), KL16),
    "tokenbridge": TokenSpec.factorised((16, 16), (64,) * 16, values="normal(5,3)"),
}
EMOJI = {  # likewise; others' are ids
    **dict.fromkeys(("mar", "xar", "flowar"), TokenSpec.latents((8, 8), 4)),
    "tokenbridge": TokenSpec.factorised((8, 8), (64,) * 4, values="normal(5,3)"),
}
CODES = {  # of the models whose name begins so, which are fed what their tokens stand for
    "tokenflow_emoji": (4096, 40, (1, 2, 4, 8)),
    "tokenflow": (32768, 40, (1, 2, 4, 6, 8, 10, 12, 14, 16)),
    "var_emoji": (1024, 16, (1, 2, 3, 4, 6, 8)),
    "var_d36_s": (4096, 32, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
    "var": (4096, 32, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
}
SIDES = {"256": 16, "384": 24, "512": 32}


def made(value):
    """An argument, or the part of a model that it describes."""
    if isinstance(value, dict) and "class_path" in value:
        return getattr(vistok, value["class_path"])(**value.get("init_args", {}))
    return value


def build(name: str, config: dict):
    arguments = {name: made(value) for name, value in config["generator"]["init_args"].items()}
    if sizes := next((sizes for start, sizes in CODES.items() if name.startswith(start)), None):
        arguments["codes"] = codes = MultiScale(VQ(*sizes[:2]), sizes[2])
        spec, classes = codes.spec(codes.scales[-1]), 9 if "emoji" in name else 1000
    elif "emoji" in name:
        spec, classes = EMOJI.get(name.split("_")[0], TokenSpec.ids((8, 8), 4096)), 9
    elif "video" in name:
        spec, classes = TokenSpec.ids((4, 16, 16), 8192), 101
    elif start := next((start for start in IMAGENET if name.startswith(start)), None):
        spec, classes = IMAGENET[start], 1000
    else:
        side = SIDES[name.split("_")[-1]]
        spec, classes = TokenSpec.ids((side, side), 16384), 1000
    family = getattr(vistok, config["generator"]["class_path"])
    with torch.device("meta"):
        return family(spec, [str(i) for i in range(classes)], **arguments)


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
    decoding = Decoding.from_dict(config.get("decoding", {}))
    decoding.scales(decoding.plan_of(model))
    assert config["images"] >= config["batch_size"]


def test_every_published_size_has_its_config():
    names = {file.stem for file in CONFIGS.glob("*.yaml")}
    assert set(PUBLISHED) <= names


@pytest.mark.parametrize(
    ("depth", "millions"), [(10, 49), (12, 85), (16, 201), (20, 393), (24, 679), (30, 1330)]
)
def test_flexar_blocks(depth, millions):
    """Published are 12 weights a block and square of the width; feed-forward layers are rounded up
    to a multiple of 256."""
    file = CONFIGS / f"flexar_d{depth}.yaml"
    blocks = build(file.stem, yaml.safe_load(file.read_text())).blocks
    assert sum(p.numel() for p in blocks.parameters()) == pytest.approx(millions * 1e6, rel=0.04)
