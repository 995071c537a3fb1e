"""Scores and what they rest on: features, statistics, protocols."""

from vistok.metrics.comparison import (
    ESTIMATORS,
    Reference,
    SetMetric,
    caveats,
    choose,
    set_scores,
)
from vistok.metrics.features import FeatureNetwork, Features, load_features
from vistok.metrics.pairs import PairScores
from vistok.metrics.pictures import NpzImages, Pictures, open_pictures
from vistok.metrics.protocols import (
    Protocol,
    Result,
    compare,
    find_result,
    read_results,
    require_same_protocol,
    write_result,
)
from vistok.metrics.scores import (
    code_counts,
    code_entropy,
    codebook_usage,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
    psnr,
    ssim,
)
from vistok.metrics.statistics import Collector, Moments, Statistics

__all__ = [
    "ESTIMATORS",
    "Collector",
    "FeatureNetwork",
    "Features",
    "Moments",
    "NpzImages",
    "PairScores",
    "Pictures",
    "Protocol",
    "Reference",
    "Result",
    "SetMetric",
    "Statistics",
    "caveats",
    "choose",
    "code_counts",
    "code_entropy",
    "codebook_usage",
    "compare",
    "find_result",
    "frechet_distance",
    "inception_score",
    "kid",
    "load_features",
    "open_pictures",
    "precision_recall",
    "psnr",
    "read_results",
    "require_same_protocol",
    "set_scores",
    "ssim",
    "write_result",
]
