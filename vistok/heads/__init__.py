"""Heads: hidden state to the tokens of one set."""

from vistok.heads.base import Head, ValueHead
from vistok.heads.categorical import CategoricalHead
from vistok.heads.diffusion import DiffusionHead
from vistok.heads.dimension_wise import DimensionWiseHead
from vistok.heads.flow import FlowHead
from vistok.heads.flow_transformer import FlowTransformerHead

__all__ = [
    "CategoricalHead",
    "DiffusionHead",
    "DimensionWiseHead",
    "FlowHead",
    "FlowTransformerHead",
    "Head",
    "ValueHead",
]
