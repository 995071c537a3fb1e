"""What features tell of classes: a linear probe (Alain & Bengio, 2016, arXiv:1610.01644), trained
as CLIP's are (Radford et al., 2021, arXiv:2103.00020, appendix A.3), and retrieval.

Both learn from the features of training pictures, which are the gallery of retrieval, and are
scored on held-out ones. Nothing of a probe is chosen by the pictures that score it: the strength of
its penalty comes from a fifth of the training pictures, mean and deviation of features from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from vistok.errors import UserError
from vistok.metrics.pictures import Pictures
from vistok.metrics.statistics import IndexedTable

Pooling = Literal["mean", "flat"]

PIXELS = 8
STRENGTHS = tuple(10.0**exponent for exponent in range(1, -7, -1))
ITERATIONS, TOLERANCE = 1000, 1e-6  # of steps, and of the gradient of the mean
VALIDATION = 5  # one picture in so many
NEAREST = (1, 5, 10)
BLOCK = 2**24  # bounds the memory of logits and of similarities, in numbers
PROBE_ESTIMATORS = (
    f"logistic regression on standardised features, L2 of {STRENGTHS[-1]:g} to {STRENGTHS[0]:g} by "
    f"accuracy on 1/{VALIDATION} of the training pictures, L-BFGS of at most {ITERATIONS} steps; "
    "retrieval by cosine similarity from the training pictures"
)


@dataclass(frozen=True)
class Labelled:
    """Features of pictures, a row each, and their classes."""

    vectors: Float[Tensor, "n d"]
    labels: Int64[Tensor, "n"]

    def __getitem__(self, rows: Bool[Tensor, "n"]) -> "Labelled":
        return Labelled(self.vectors[rows], self.labels[rows])


class FeatureTables:
    """Features of pictures of these `labels`, whichever process brought them, one vector each: the
    mean over tokens, or all of them in a row (`flat`), which tells the place of a token but can be
    long; and `pixels`, the picture averaged to 8 x 8, whose scores any others must exceed.

    `example` is what `update` will take, of any one picture.
    """

    def __init__(
        self,
        labels: Int64[Tensor, "count"],
        example: Mapping[str, Float[Tensor, "b n d"]],
        pooling: Pooling = "mean",
        device: torch.device | str = "cpu",
    ):
        home = "cpu" if torch.device(device).type == "mps" else device  # has no float64
        self.labels, self.pooling = labels.to(home), pooling
        dims = {name: self._pooled(tokens).shape[1] for name, tokens in example.items()}
        dims["pixels"] = 3 * PIXELS**2
        self.tables = {
            name: IndexedTable(len(labels), dim, device=home) for name, dim in dims.items()
        }

    def update(
        self,
        indices: Int64[Tensor, "b"],
        features: Mapping[str, Float[Tensor, "b n d"]],
        images: Float[Tensor, "b 3 h w"],
    ) -> None:
        """Add some pictures; raises `UserError` for features that are not finite."""
        vectors = {name: self._pooled(tokens) for name, tokens in features.items()}
        vectors["pixels"] = F.adaptive_avg_pool2d(images, PIXELS).flatten(1)
        for name, table in self.tables.items():
            if not torch.isfinite(vectors[name]).all():
                raise UserError(f"features '{name}' of images {indices.tolist()} are not finite")
            table.update(indices, vectors[name])

    def reduce(self) -> dict[str, Labelled]:
        """Return the features that all processes added, on each of them."""
        return {n: Labelled(table.all_reduce(), self.labels) for n, table in self.tables.items()}

    def _pooled(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b w"]:
        return tokens.float().mean(1) if self.pooling == "mean" else tokens.float().flatten(1)


class LinearProbe:
    """Multinomial logistic regression: the weights W of standardised features x, and biases, of
    least mean cross-entropy + `strength` / 2 |W|^2, which is a unique minimum (float64).

    `start`, a probe of the same training pictures, saves steps. A feature that is constant in
    training is not read; classes without training pictures are never predicted.
    """

    def __init__(self, train: Labelled, strength: float, start: "LinearProbe | None" = None):
        self.strength = strength
        self.classes, targets = train.labels.unique(return_inverse=True)
        vectors = train.vectors.double()
        deviation, self.mean = torch.std_mean(vectors, dim=0, correction=0)
        # Float32 features that differ by less than this differ by rounding.
        varies = deviation > 1e-6 * self.mean.abs()
        self.scale = torch.where(varies, 1 / deviation, 0)
        rows = self._rows(vectors)
        if start is None:
            self.weights = rows.new_zeros(rows.shape[1], len(self.classes))
        else:
            self.weights = start.weights.clone()
        self._minimise(rows, targets)

    def logits(self, vectors: Float[Tensor, "n d"]) -> Float64[Tensor, "n c"]:
        """Return the logits of the classes of the training pictures."""
        return self._rows(vectors.double()) @ self.weights

    def predict(self, vectors: Float[Tensor, "n d"]) -> Int64[Tensor, "n"]:
        """Return the likeliest class of each picture."""
        blocks = vectors.split(max(1, BLOCK // len(self.classes)))
        return self.classes[torch.cat([self.logits(block).argmax(1) for block in blocks])]

    def _rows(self, vectors: Float64[Tensor, "n d"]) -> Float64[Tensor, "n d1"]:
        """Return standardised features, and a 1 for the bias."""
        return F.pad((vectors - self.mean) * self.scale, (0, 1), value=1.0)

    def _minimise(self, rows: Float64[Tensor, "n d1"], targets: Int64[Tensor, "n"]) -> None:
        size = max(1, BLOCK // len(self.classes))
        blocks = list(zip(rows.split(size), targets.split(size), strict=True))
        penalised = torch.ones_like(self.weights)
        penalised[-1] = 0

        def evaluate() -> Tensor:
            # Sums, not means: steps on means become so short that L-BFGS forgets its curvature.
            penalty = len(rows) * self.strength * penalised * self.weights
            loss, gradient = (penalty * self.weights).sum() / 2, penalty
            for x, y in blocks:
                log_p = (x @ self.weights).log_softmax(1)
                loss = loss + F.nll_loss(log_p, y, reduction="sum")
                residual = log_p.exp() - F.one_hot(y, len(self.classes))
                gradient = torch.addmm(gradient, x.T, residual)
            self.weights.grad = gradient
            return loss

        torch.optim.LBFGS(
            [self.weights],
            max_iter=ITERATIONS,
            max_eval=2 * ITERATIONS,
            tolerance_grad=TOLERANCE * len(rows),
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        ).step(evaluate)
        self.weights.grad = None


def train_probe(train: Labelled) -> LinearProbe:
    """Return the probe of the strength that does best, trained without them, on a fifth of the
    training pictures; of equals the strongest. Weaker ones are tried until two in a row fall back.
    """
    aside = validation_rows(train.labels)
    fitted, validation = train[~aside], train[aside]
    probe, accuracies = None, []
    for strength in STRENGTHS:
        probe = LinearProbe(fitted, strength, start=probe)
        right = probe.predict(validation.vectors) == validation.labels
        accuracies.append(int(right.sum()))
        if max(accuracies[-2:]) < max(accuracies):
            break
    return LinearProbe(train, STRENGTHS[accuracies.index(max(accuracies))])


def validation_rows(labels: Int64[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Mark the last fifth of each class, at least one picture of two: neighbours in a source are
    often alike, and stay on one side."""
    aside = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        if len(rows) > 1:
            aside[rows[-max(1, len(rows) // VALIDATION) :]] = True
    return aside


def accuracy_scores(predicted: Int64[Tensor, "n"], labels: Int64[Tensor, "n"]) -> dict[str, float]:
    """Return the share of right predictions, over pictures and as a mean over classes, which
    frequent ones do not dominate."""
    right = (predicted == labels).double()
    by_class = [right[labels == label].mean() for label in labels.unique()]
    return {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(torch.stack(by_class).mean()),
    }


def retrieval_scores(queries: Labelled, gallery: Labelled) -> dict[str, float]:
    """Return R@k, the share of queries with a picture of their class among the k nearest of the
    gallery, and mAP, the mean average precision of the whole ranking, by cosine similarity; of
    equals the earlier first. A query whose class the gallery lacks counts as 0."""
    keys = F.normalize(gallery.vectors.float(), dim=1).T
    places = torch.arange(1, len(gallery.labels) + 1, device=keys.device)
    size = max(1, BLOCK // len(places))
    found_at, precisions = [], []
    for vectors, labels in zip(
        queries.vectors.split(size), queries.labels.split(size), strict=True
    ):
        similarity = F.normalize(vectors.float(), dim=1) @ keys
        order = similarity.argsort(dim=1, descending=True, stable=True)
        relevant = gallery.labels[order] == labels[:, None]
        found = relevant.cumsum(1)
        found_at.append(torch.stack([found[:, :k][:, -1] > 0 for k in NEAREST], dim=1))
        precision = (found / places.double() * relevant).sum(1)
        precisions.append(precision / found[:, -1].clamp(min=1))
    recall = torch.cat(found_at).double().mean(0).tolist()
    scores = {f"R@{k}": value for k, value in zip(NEAREST, recall, strict=True)}
    return scores | {"mAP": float(torch.cat(precisions).mean())}


def chance_scores(
    labels: Int64[Tensor, "m"], gallery_labels: Int64[Tensor, "n"]
) -> dict[str, float]:
    """Return the expected `retrieval_scores` of a random ranking, exactly."""
    total = len(gallery_labels)
    counts = gallery_labels.bincount(minlength=int(labels.max()) + 1)
    relevant = counts[labels].double()  # pictures of a query's class
    places = torch.arange(min(max(NEAREST), total), device=relevant.device)
    none_yet = (total - relevant[:, None] - places).clamp(min=0) / (total - places)
    none_yet = none_yet.cumprod(1)
    scores = {f"R@{k}": float(1 - none_yet[:, :k][:, -1].mean()) for k in NEAREST}
    harmonic = float((1 / torch.arange(1, total + 1, dtype=torch.float64)).sum())
    # At place i of a relevant picture, (relevant - 1) / (total - 1) of the i - 1 before are, too.
    others = (relevant - 1) / (total - 1)
    precision = (harmonic + (total - harmonic) * others) / total
    return scores | {"mAP": float(torch.where(relevant > 0, precision, 0).mean())}


def probe_scores(
    training: Mapping[str, Labelled], held_out: Mapping[str, Labelled]
) -> dict[str, float]:
    """Return, by `features/score`, the dimension of each features, the strength chosen, and the
    scores of probe and retrieval on the held-out pictures. The last rows read no features:
    `majority` is the most frequent class of the training pictures, `chance` a random ranking."""
    rows = {}
    for name, train in training.items():
        probe, shown = train_probe(train), held_out[name]
        rows[name] = {
            "dim": float(train.vectors.shape[1]),
            "L2": probe.strength,
            **accuracy_scores(probe.predict(shown.vectors), shown.labels),
            **retrieval_scores(shown, train),
        }
    majority = train.labels.bincount().argmax().expand_as(shown.labels)
    rows["majority"] = accuracy_scores(majority, shown.labels)
    rows["chance"] = chance_scores(shown.labels, train.labels)
    return {
        f"{row}/{score}": value for row, found in rows.items() for score, value in found.items()
    }


def probe_caveats(training: Mapping[str, Labelled], held_out: Mapping[str, Labelled]) -> list[str]:
    """Return what a reader of the scores must know, one sentence each."""
    train, shown = training["pixels"], held_out["pixels"]
    notes = []
    seen = {row.tobytes() for row in train.vectors.cpu().numpy()}
    copies = sum(row.tobytes() in seen for row in shown.vectors.cpu().numpy())
    if copies:
        notes.append(
            f"{copies} of {len(shown.labels)} held-out pictures equal training pictures at "
            f"{PIXELS} x {PIXELS} pixels"
        )
    unseen = int((~torch.isin(shown.labels, train.labels)).sum())
    if unseen:
        notes.append(f"{unseen} held-out pictures of classes without training pictures count as 0")
    return notes


def require_probe_sets(training: Pictures, held_out: Pictures) -> None:
    """Raise `UserError` unless a probe can be trained on one set and scored on the other."""
    for pictures in (training, held_out):
        counts = pictures.labels().bincount()
        if int((counts > 0).sum()) < 2:
            raise UserError(
                f"{pictures}: all of one class, a probe needs labels of at least two, as those of "
                "a folder with a directory for each class"
            )
        if pictures is training and int(counts.max()) < 2:
            raise UserError(f"{pictures}: a probe needs more than one picture of a class")
    names, others = training.source.class_names, held_out.source.class_names
    if names != others:
        differing = sorted(set(names) ^ set(others))
        raise UserError(
            f"{training.source.name} and {held_out.source.name} have different classes"
            + (f", as '{differing[0]}'" if differing else ": the same, in another order")
        )
    same_name = training.source.name == held_out.source.name
    if same_name and torch.equal(training[0][1], held_out[0][1]):
        raise UserError(
            f"{held_out}: a probe trained on them cannot be scored on them; hold other pictures out"
        )
