"""Images to tokens and back: one file per published tokenizer."""

from vistok.tokenizers.base import QuantizedTokenizer, Tokenizer, TokenizerOutput
from vistok.tokenizers.conv import ConvTokenizer
from vistok.tokenizers.larp import LARP
from vistok.tokenizers.retok import ReTok
from vistok.tokenizers.titok import TiTok

__all__ = [
    "LARP",
    "ConvTokenizer",
    "QuantizedTokenizer",
    "ReTok",
    "TiTok",
    "Tokenizer",
    "TokenizerOutput",
]
