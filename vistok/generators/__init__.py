"""Generators: condition to tokens, one file per published family."""

from vistok.generators.base import Generator, GeneratorOutput
from vistok.generators.conditions import Captions, Condition, Prompts
from vistok.generators.flowar import FlowAR
from vistok.generators.llamagen import LlamaGen
from vistok.generators.mar import MAR
from vistok.generators.maskgit import MaskGIT
from vistok.generators.nar import NAR
from vistok.generators.par import PAR
from vistok.generators.rar import RAR
from vistok.generators.tokenflow import NextScaleLlama
from vistok.generators.var import VAR
from vistok.generators.xar import XAR

__all__ = [
    "MAR",
    "NAR",
    "PAR",
    "RAR",
    "VAR",
    "XAR",
    "Captions",
    "Condition",
    "FlowAR",
    "Generator",
    "GeneratorOutput",
    "LlamaGen",
    "MaskGIT",
    "NextScaleLlama",
    "Prompts",
]
