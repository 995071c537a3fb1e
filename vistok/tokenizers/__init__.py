"""Images to tokens and back: one file per published tokenizer."""

from vistok.tokenizers.base import QuantizedTokenizer, Tokenizer, TokenizerOutput
from vistok.tokenizers.conv import ConvTokenizer
from vistok.tokenizers.flextok import FlexTok
from vistok.tokenizers.kl import KLAutoencoder, KLTokenizer
from vistok.tokenizers.larp import LARP
from vistok.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vistok.tokenizers.retok import ReTok
from vistok.tokenizers.titok import TiTok
from vistok.tokenizers.titok_two_stage import TwoStageTiTok
from vistok.tokenizers.tokenflow import TokenFlow

__all__ = [
    "LARP",
    "ConvTokenizer",
    "FlexTok",
    "KLAutoencoder",
    "KLTokenizer",
    "MaskGITVQGAN",
    "QuantizedTokenizer",
    "ReTok",
    "TiTok",
    "TokenFlow",
    "Tokenizer",
    "TokenizerOutput",
    "TwoStageTiTok",
]
