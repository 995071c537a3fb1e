"""Generators: condition to tokens, one file per published family."""

from vistok.generators.base import Generator, GeneratorOutput
from vistok.generators.llamagen import LlamaGen

__all__ = ["Generator", "GeneratorOutput", "LlamaGen"]
