"""Where pictures and tokens come from, and in which order."""

from vistok.data.captions import CaptionSpec
from vistok.data.emoji import Emoji
from vistok.data.folder import ImageFolder
from vistok.data.shards import TarShards
from vistok.data.sources import BrokenSampleError, ImageSource, Sample
from vistok.data.stream import (
    EvaluationImages,
    HeldOut,
    ImageCrops,
    Images,
    PositionSampler,
    Stream,
    make_loader,
    shard_range,
)
from vistok.data.token_cache import TokenCache, TokenCacheHeader, TokenCacheWriter
from vistok.data.transforms import Transform, to_uint8

__all__ = [
    "BrokenSampleError",
    "CaptionSpec",
    "Emoji",
    "EvaluationImages",
    "HeldOut",
    "ImageCrops",
    "ImageFolder",
    "ImageSource",
    "Images",
    "PositionSampler",
    "Sample",
    "Stream",
    "TarShards",
    "TokenCache",
    "TokenCacheHeader",
    "TokenCacheWriter",
    "Transform",
    "make_loader",
    "shard_range",
    "to_uint8",
]
