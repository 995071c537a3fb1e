"""Scores of a set of images against a reference set, by name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from vistok.data import ImageSource, Transform
from vistok.errors import UserError
from vistok.metrics.features import FeatureNetwork
from vistok.metrics.pictures import Pictures, open_pictures
from vistok.metrics.scores import frechet_distance, inception_score, kid, precision_recall
from vistok.metrics.statistics import MAX_VECTORS, Statistics, npz_names

SetMetric = Literal["fid", "is", "kid", "precision_recall"]

SPLITS, SUBSETS, SUBSET_SIZE, NEIGHBOURS = 10, 100, 1000, 3
ESTIMATORS = (
    f"IS in {SPLITS} splits, KID over {SUBSETS} subsets of at most {SUBSET_SIZE}, precision and "
    f"recall with k = {NEIGHBOURS}; the last three of at most {MAX_VECTORS} images"
)
FEWEST_IMAGES = {"fid": 2, "is": SPLITS, "kid": 2, "precision_recall": NEIGHBOURS + 1}


@dataclass(frozen=True)
class Reference:
    """What a set of images is compared with: statistics from a file, pictures still to be read, or
    both, as ADM's files hold moments of a whole data set beside 10,000 of its images."""

    statistics: Statistics | None
    pictures: Pictures | None

    @classmethod
    def open(
        cls,
        where: ImageSource | str,
        transform: str,
        size: tuple[int, int],
        network: FeatureNetwork,
        with_vectors: bool,
    ) -> "Reference":
        """Open what `where` names (see `open_pictures`) for images of `size`; `with_vectors` asks
        for more than moments. Raises `UserError` where sizes or features differ."""
        statistics = None
        if isinstance(where, str) and where.endswith(".npz"):
            names = npz_names(where)
            if "mu" in names:
                statistics = _fitting_statistics(where, size, network)
                has_all = statistics.vectors is not None or not with_vectors
                if has_all or "arr_0" not in names:
                    return cls(statistics, None)
        square = size[0] == size[1]
        crop = Transform(transform, size[0]) if square else None
        pictures = Pictures(open_pictures(where), crop)
        if pictures.size != size:
            raise UserError(
                f"reference {pictures}: the images to compare are {size[1]} x {size[0]}"
            )
        return cls(statistics, pictures)

    def __str__(self) -> str:
        return self.statistics.pictures if self.statistics else str(self.pictures)

    @property
    def count(self) -> int | None:
        """Images behind the moments; None where a file does not say."""
        return self.statistics.count if self.statistics else len(self.pictures)

    @property
    def num_vectors(self) -> int:
        """Images whose vectors are, or can be, at hand."""
        if self.pictures is not None:
            return len(self.pictures)
        return 0 if self.statistics.vectors is None else len(self.statistics.vectors)

    def completed(self, read: Statistics | None) -> Statistics:
        """Return the statistics, given those of `pictures`."""
        if self.statistics is None or read is None:
            return self.statistics or read
        return replace(self.statistics, vectors=read.vectors)


def _fitting_statistics(path: str, size: tuple[int, int], network: FeatureNetwork) -> Statistics:
    statistics = Statistics.load(path)
    if statistics.features not in (None, network.label) or len(statistics.mean) != network.dim:
        made_by = statistics.features or "a network"
        raise UserError(
            f"reference {path}: made by {made_by} of {len(statistics.mean)} features, not by "
            f"{network.label} of {network.dim}: choose the same --features"
        )
    if statistics.size not in (None, size):
        raise UserError(
            f"reference {path}: of pictures {statistics.size[1]} x {statistics.size[0]}, the "
            f"images are {size[1]} x {size[0]}"
        )
    return statistics


def choose(
    asked: Sequence[str] | None,
    offered: Sequence[str],
    count: int,
    network: FeatureNetwork | None,
    reference: Reference | None,
) -> list[str]:
    """Return the metrics to compute of `count` images: those asked for, or by default (None) those
    of `offered` that can be. Raises `UserError` for one asked for that lacks something, and for too
    few images."""
    wanted = []
    for metric in asked or offered:
        if metric in get_args(SetMetric):
            lacks = _lack(metric, network, reference)
        else:
            lacks = None if metric in offered else "a tokenizer that offers it, and data"
        if lacks is None:
            wanted.append(metric)
        elif asked:
            raise UserError(f"metric '{metric}' needs {lacks}")
    for metric in wanted:
        fewest = count if metric == "is" else _smaller(count, reference)
        needed = FEWEST_IMAGES.get(metric, 1)
        if fewest < needed:
            raise UserError(f"{fewest} image(s) are too few for {metric}: at least {needed}")
    return wanted


def _lack(metric: str, network: FeatureNetwork | None, reference: Reference | None) -> str | None:
    """Return what a metric of sets lacks, in words; None where it can be computed."""
    if metric == "is":
        return (
            None
            if network and network.num_logits
            else "features with logits, as those of inception"
        )
    if reference is None:
        return "a reference"
    if metric != "fid" and not reference.num_vectors:
        return "pictures as reference, not their mean and covariance alone"
    return None


def caveats(
    metrics: Sequence[str], images: Statistics | None, reference: Reference | None
) -> list[str]:
    """Return what a reader of the scores must know, one sentence each."""
    if "fid" not in metrics:
        return []
    fewest, dim = _smaller(images.count, reference), len(images.mean)
    if fewest > dim:
        return []
    return [f"FID of {fewest} images in {dim} dimensions is biased upwards"]


def _smaller(count: int, reference: Reference | None) -> int:
    return min(count, (reference and reference.count) or count)


def set_scores(
    metrics: Iterable[str], images: Statistics | None, reference: Statistics | None
) -> dict[str, float]:
    """Return those of `metrics` that are of sets, with deviations where a metric has one."""
    scores = {}
    for metric in metrics:
        if metric == "fid":
            moments = images.mean, images.covariance, reference.mean, reference.covariance
            scores["fid"] = frechet_distance(*moments)
        elif metric == "is":
            scores["is"], scores["is_deviation"] = inception_score(images.logits, SPLITS)
        elif metric == "kid":
            size = min(SUBSET_SIZE, len(images.vectors), len(reference.vectors))
            estimate = kid(images.vectors, reference.vectors, SUBSETS, size)
            scores["kid"], scores["kid_deviation"] = estimate
        elif metric == "precision_recall":
            shares = precision_recall(images.vectors, reference.vectors, NEIGHBOURS)
            scores["precision"], scores["recall"] = shares
    return scores
