"""Heads: hidden state to the tokens of one set."""

from vistok.heads.base import Head, ValueHead
from vistok.heads.categorical import CategoricalHead

__all__ = ["CategoricalHead", "Head", "ValueHead"]
