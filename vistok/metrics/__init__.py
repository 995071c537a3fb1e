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
from vistok.metrics.probe import (
    PROBE_ESTIMATORS,
    FeatureTables,
    Labelled,
    LinearProbe,
    Pooling,
    probe_caveats,
    probe_scores,
    require_probe_sets,
)
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
    "PROBE_ESTIMATORS",
    "Collector",
    "FeatureNetwork",
    "FeatureTables",
    "Features",
    "Labelled",
    "LinearProbe",
    "Moments",
    "NpzImages",
    "PairScores",
    "Pictures",
    "Pooling",
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
    "probe_caveats",
    "probe_scores",
    "psnr",
    "read_results",
    "require_probe_sets",
    "require_same_protocol",
    "set_scores",
    "ssim",
    "write_result",
]
