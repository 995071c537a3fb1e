"""Tiny forms of everything that meets in the product of tokenizers, generators, heads and plans."""

from collections.abc import Callable

from vistok.generators import (
    MAR,
    NAR,
    PAR,
    RAR,
    VAR,
    XAR,
    FlowAR,
    Generator,
    LlamaGen,
    MaskGIT,
    NextScaleLlama,
)
from vistok.heads import DiffusionHead, DimensionWiseHead, FlowHead, FlowTransformerHead, Head
from vistok.layers.image_towers import CLIPTower
from vistok.quantizers import FSQ, VQ, DimensionWise, Gaussian, MultiScale, Product, Quantizer
from vistok.tokenizers import (
    LARP,
    ConvTokenizer,
    FlexTok,
    KLAutoencoder,
    KLTokenizer,
    MaskGITVQGAN,
    ReTok,
    TiTok,
    TokenFlow,
    Tokenizer,
    TwoStageTiTok,
)

SIDE = 16  # pixels, for a grid of 4x4 tokens, a sequence of 4 or a video of 2x2x2
QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "FSQ": lambda: FSQ([4, 2]),
    "Product": lambda: Product(FSQ([4, 2]), 2),
    "DimensionWise": lambda: DimensionWise(4, 8),
    "Gaussian": lambda: Gaussian(4),
    "MultiScale": lambda: MultiScale(VQ(8, 4), (1, 2, 4)),
    "MultiScale of Product": lambda: MultiScale(Product(VQ(8, 2), 2), (1, 2, 4)),
}
CONV = {"channels": 8, "num_res_blocks": 1, "z_channels": 8}
VIT = {
    f"{part}_{size}": number
    for part in ("encoder", "decoder")
    for size, number in {"width": 24, "depth": 1, "heads": 2}.items()
}
PROXY = {
    "num_proxy_codes": 8,
    "vqgan_channels": 8,
    "vqgan_channel_multipliers": (1, 1, 1),
    "vqgan_res_blocks": 1,
    "vqgan_dim": 6,
}


def _autoencoder(levels: int) -> KLAutoencoder:
    return KLAutoencoder(4, [8] * levels, layers_per_block=1, norm_groups=4)


# By name of the class and, after a comma, what else changes the tokens.
TOKENIZERS: dict[str, Callable[[Quantizer], Tokenizer]] = {
    "ConvTokenizer": lambda q: ConvTokenizer(q, SIDE, channel_multipliers=(1, 1, 1), **CONV),
    "MaskGITVQGAN": lambda q: MaskGITVQGAN(q, SIDE, 8, (1, 1, 1), num_res_blocks=1),
    "KLTokenizer": lambda q: KLTokenizer(q, _autoencoder(3), SIDE),
    "TokenFlow": lambda q: TokenFlow(
        q, CLIPTower(4, 24, 1, 2, 4), SIDE, 1, None, channel_multipliers=(1, 1, 1), **CONV
    ),
    "TiTok": lambda q: TiTok(q, SIDE, 4, 4, **VIT),
    "TiTok, tail drop": lambda q: TiTok(q, SIDE, 4, 4, tail_drop="uniform", **VIT),
    "TwoStageTiTok": lambda q: TwoStageTiTok(
        q, 2, image_size=SIDE, patch_size=4, num_latent_tokens=4, **PROXY, **VIT
    ),
    "ReTok": lambda q: ReTok(q, SIDE, 4, 2, channel_multipliers=(1, 1, 1), **VIT, **CONV),
    "ReTok, tail drop": lambda q: ReTok(
        q, SIDE, 4, 2, "uniform", channel_multipliers=(1, 1, 1), **VIT, **CONV
    ),
    "FlexTok": lambda q: FlexTok(q, _autoencoder(2), SIDE, 4, 4, steps=2, time_dim=16, **VIT),
    "LARP": lambda q: LARP(q, 4, SIDE, (2, 8, 8), token_shape=(2, 2, 2), **VIT),
}
# Of generators, with the arguments that each takes beside `SIZES`.
SIZES = {"dim": 32, "depth": 1, "num_heads": 2}
GENERATORS: dict[type[Generator], dict] = {
    LlamaGen: {},
    PAR: {},
    NAR: {},
    MaskGIT: {},
    RAR: {},
    VAR: {},
    NextScaleLlama: {},
    MAR: {"buffer": 2},
    XAR: {"order": "cells(2)"},
    FlowAR: {"scales": (1, 2, 4)},
}
HEADS: dict[type[Head], dict] = {  # those that are an argument of generators
    DiffusionHead: {"width": 32, "depth": 1},
    FlowHead: {"width": 32, "depth": 1},
    FlowTransformerHead: {"width": 64, "depth": 1},
    DimensionWiseHead: {"width": 32, "depth": 1, "num_heads": 2},
}
# Plans of every order by its name.
PLANS: dict[str, tuple[str, ...]] = {
    "raster": ("raster",),
    "diagonal": ("diagonal", "diagonal(flip)"),
    "random": ("random(7)",),
    "par": ("par(4)",),
    "nar": ("nar",),
    "zipar": ("zipar(2)", "zipar(2,masked)", "zipar(2,adaptive)"),
    "maskgit": ("maskgit(3)", "maskgit(2,cosine)"),
    "mar": ("mar(3)",),
    "cells": ("cells(1)", "cells(2)", "cells(4)"),
    "subsamples": ("subsamples(2)",),
    "scales": ("scales(1,2,4)",),
    "next_scale": ("next_scale", "next_scale(2)"),
}
