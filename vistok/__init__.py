"""vistok: visual tokenizers and the generators that decode them, as parts of one machine.

Names are imported on first use, so that `import vistok` costs nothing beside torch.
"""

import importlib

_MODULES = {
    "vistok.tokens": ["TokenSpec"],
    "vistok.pipelines": ["ImagePipeline"],
    "vistok.quantizers": [
        "BSQ",
        "EMAVQ",
        "FSQ",
        "IBQ",
        "LFQ",
        "VQ",
        "DimensionWise",
        "DualVQ",
        "Gaussian",
        "MultiScale",
        "NormEMAVQ",
        "Product",
        "Projected",
        "Residual",
        "ResidualFSQ",
        "ResidualLFQ",
        "SimVQ",
        "StochasticVQ",
    ],
    "vistok.tokenizers": [
        "LARP",
        "ConvTokenizer",
        "FlexTok",
        "KLAutoencoder",
        "KLTokenizer",
        "MaskGITVQGAN",
        "ReTok",
        "TiTok",
        "TokenFlow",
        "Tokenizer",
        "TwoStageTiTok",
    ],
    "vistok.layers.image_towers": ["CLIPTower", "SigLIPTower", "TimmTower"],
    "vistok.heads": [
        "CategoricalHead",
        "DiffusionHead",
        "DimensionWiseHead",
        "FlowHead",
        "FlowTransformerHead",
    ],
    "vistok.generators": [
        "MAR",
        "NAR",
        "PAR",
        "RAR",
        "VAR",
        "XAR",
        "Captions",
        "FlowAR",
        "Generator",
        "LlamaGen",
        "MaskGIT",
        "NextScaleLlama",
    ],
    "vistok.decoding": ["Noise", "Order", "Plan", "Schedule", "decode"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'vistok' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
