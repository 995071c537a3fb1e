"""Heads: hidden state to the tokens of one set."""

from vistok.heads.base import Head, ValueHead
from vistok.heads.categorical import CategoricalHead
from vistok.heads.diffusion import DiffusionHead

__all__ = ["CategoricalHead", "DiffusionHead", "Head", "ValueHead"]
