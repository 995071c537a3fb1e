"""Probes and retrieval: equal to other ways to the same numbers, and blind to held-out pictures."""

import pytest
import torch
from torch import nn

from vistok.data import Emoji, ImageSource
from vistok.errors import UserError
from vistok.metrics import FeatureTables, Labelled, LinearProbe, Pictures, require_probe_sets
from vistok.metrics.probe import (
    NEAREST,
    STRENGTHS,
    accuracy_scores,
    chance_scores,
    probe_caveats,
    probe_scores,
    retrieval_scores,
    train_probe,
    validation_rows,
)


def blobs(count: int, classes: int = 3, dim: int = 4, spread: float = 1.0, seed: int = 0):
    """Points around one centre a class, of which the first is the most frequent."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes + 1, (count,), generator=random) % classes
    centres = 3 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    vectors = centres[labels] + spread * torch.randn(count, dim, generator=random)
    return Labelled(vectors, labels)


def test_separable_classes_are_told_exactly():
    train, held_out = blobs(120, spread=0.05), blobs(60, spread=0.05, seed=1)
    scores = probe_scores({"tokens": train}, {"tokens": held_out})
    assert scores["tokens/accuracy"] == scores["tokens/balanced_accuracy"] == 1
    assert scores["tokens/R@1"] == scores["tokens/mAP"] == 1
    # Of strengths that do equally well the strongest; under more the biases outweigh the features.
    assert scores["tokens/L2"] == STRENGTHS[1]


def test_the_minimum_is_that_of_newton():
    train, strength = blobs(80, dim=3, spread=3.0), 1e-2
    deviation, mean = torch.std_mean(train.vectors.double(), dim=0, correction=0)
    rows = nn.functional.pad((train.vectors - mean) / deviation, (0, 1), value=1.0)

    def objective(flat: torch.Tensor) -> torch.Tensor:
        weights = flat.view(4, 3)
        loss = nn.functional.cross_entropy(rows @ weights, train.labels)
        return loss + strength / 2 * weights[:-1].square().sum()

    flat = torch.zeros(12, dtype=torch.float64)
    for _ in range(20):
        hessian = torch.func.hessian(objective)(flat)
        # Equal shifts of all biases change nothing: the pseudo-inverse leaves them alone.
        flat = flat - torch.linalg.pinv(hessian, hermitian=True) @ torch.func.grad(objective)(flat)
    probe = LinearProbe(train, strength)
    assert torch.allclose(probe.weights, flat.view(4, 3), atol=1e-5)
    # Wherever it starts from.
    warm = LinearProbe(train, strength, start=LinearProbe(train, 10.0))
    assert torch.allclose(warm.weights, probe.weights, atol=1e-5)


def test_groups_get_their_class_frequencies():
    """A feature for each group, hardly penalised: the likelihood's maximum is known."""
    groups = torch.tensor([0] * 10 + [1] * 10)
    labels = torch.tensor([0] * 7 + [2] * 3 + [0] * 2 + [2] * 8)
    vectors = nn.functional.one_hot(groups).float()
    probe = LinearProbe(Labelled(vectors, labels), 1e-9)
    assert probe.classes.tolist() == [0, 2]
    shares = probe.logits(torch.eye(2)).softmax(1)
    expected = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    assert torch.allclose(shares, expected, atol=1e-5)
    assert probe.predict(torch.eye(2)).tolist() == [0, 2]


def test_scale_shift_and_constant_features_do_not_matter():
    train, held_out = blobs(90, spread=3.0), blobs(50, spread=3.0, seed=1)

    def changed(vectors: torch.Tensor) -> torch.Tensor:
        # A power of two and one of 0.1, which no float32 holds, so that a mean of it is rounded.
        return torch.cat([vectors * 4, torch.full((len(vectors), 1), 0.1)], dim=1)

    logits = LinearProbe(train, 0.1).logits(held_out.vectors)
    others = LinearProbe(Labelled(changed(train.vectors), train.labels), 0.1)
    assert torch.allclose(others.logits(changed(held_out.vectors)), logits, atol=1e-6)


def test_blocks_change_nothing(monkeypatch):
    train, held_out = blobs(90, spread=3.0), blobs(50, spread=3.0, seed=1)
    whole = probe_scores({"tokens": train}, {"tokens": held_out})
    monkeypatch.setattr("vistok.metrics.probe.BLOCK", 7)
    assert probe_scores({"tokens": train}, {"tokens": held_out}) == pytest.approx(whole, rel=1e-9)


def test_held_out_pictures_do_not_reach_the_probe():
    train, held_out = blobs(90, spread=3.0), blobs(50, spread=3.0, seed=1)
    probe = train_probe(train)
    together = probe.predict(held_out.vectors)
    alone = [probe.predict(row[None]).item() for row in held_out.vectors]
    assert together.tolist() == alone
    # The same strength whatever is scored, and a prediction says nothing of the labels.
    shuffled = Labelled(held_out.vectors, held_out.labels.flip(0))
    scores = [probe_scores({"tokens": train}, {"tokens": h}) for h in (held_out, shuffled)]
    assert scores[0]["tokens/L2"] == scores[1]["tokens/L2"] == probe.strength


def test_validation_is_a_run_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 3 + [2] + [0] * 2)
    aside = validation_rows(labels)
    assert aside.nonzero().flatten().tolist() == [12, 14, 15]


def test_noise_is_penalised_most():
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(100, 60, generator=random)
    labels = torch.randint(2, (100,), generator=random)
    train = Labelled(vectors, labels)
    assert train_probe(train).strength >= 0.1


def test_imbalance_shows_in_the_balanced_accuracy():
    labels = torch.tensor([0] * 9 + [1])
    scores = accuracy_scores(torch.zeros(10, dtype=torch.int64), labels)
    assert scores == {"accuracy": pytest.approx(0.9), "balanced_accuracy": 0.5}
    # The majority is that of training, whatever is frequent among the held out.
    train = Labelled(torch.randn(10, 2), torch.tensor([0, 1] + [1] * 8))
    held_out = Labelled(torch.randn(10, 2), labels)
    found = probe_scores({"tokens": train}, {"tokens": held_out})
    assert found["majority/accuracy"] == pytest.approx(0.1)


def ranked(queries: Labelled, gallery: Labelled) -> list[list[bool]]:
    """Whether each picture of the gallery is of the query's class, nearest first."""
    rows = []
    for vector, label in zip(queries.vectors, queries.labels, strict=True):
        similarity = nn.functional.cosine_similarity(vector[None], gallery.vectors)
        order = sorted(range(len(gallery.labels)), key=lambda i, s=similarity: -s[i])
        rows.append([bool(gallery.labels[i] == label) for i in order])
    return rows


def test_retrieval_is_that_of_brute_force():
    queries, gallery = blobs(20, spread=4.0, seed=1), blobs(40, spread=4.0)
    queries.labels[0] = 3  # which the gallery lacks
    scores = retrieval_scores(queries, gallery)
    rows = ranked(queries, gallery)
    for k in NEAREST:
        assert scores[f"R@{k}"] == pytest.approx(sum(any(row[:k]) for row in rows) / len(rows))
    precisions = [
        sum(sum(row[: i + 1]) / (i + 1) for i in range(len(row)) if row[i]) / max(1, sum(row))
        for row in rows
    ]
    assert scores["mAP"] == pytest.approx(sum(precisions) / len(rows))


def test_a_gallery_smaller_than_k_is_searched_whole():
    train, held_out = blobs(6), blobs(5, seed=1)
    scores = retrieval_scores(held_out, train)
    assert scores["R@10"] == chance_scores(held_out.labels, train.labels)["R@10"] == 1


def test_chance_is_the_mean_of_random_rankings():
    random = torch.Generator().manual_seed(0)
    gallery, labels = torch.tensor([0, 0, 0, 1, 1, 2] * 3), torch.tensor([0, 1, 2, 3])
    runs = []
    for _ in range(1500):
        pair = (torch.randn(len(x), 8, generator=random) for x in (labels, gallery))
        queries, keys = (Labelled(v, x) for v, x in zip(pair, (labels, gallery), strict=True))
        runs.append(list(retrieval_scores(queries, keys).values()))
    expected = list(chance_scores(labels, gallery).values())
    assert torch.tensor(runs).mean(0).tolist() == pytest.approx(expected, abs=0.015)


def tables(batch: int, pooling: str = "mean") -> FeatureTables:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(13, 4, 6, generator=random)
    images = torch.rand(13, 3, 16, 24, generator=random)
    found = FeatureTables(torch.arange(13) % 2, {"tokens": tokens[:1]}, pooling)
    for rows in torch.randperm(13, generator=random).split(batch):
        found.update(rows, {"tokens": tokens[rows]}, images[rows])
    return found


@pytest.mark.parametrize(("pooling", "dim"), [("mean", 6), ("flat", 24)])
def test_features_do_not_depend_on_the_batch(pooling, dim):
    one, other = tables(13, pooling).reduce(), tables(4, pooling).reduce()
    assert one["tokens"].vectors.shape == (13, dim)
    assert one["pixels"].vectors.shape == (13, 192)
    for name in one:
        assert torch.equal(one[name].vectors, other[name].vectors)


def test_features_that_are_not_finite_are_refused():
    broken = {"tokens": torch.full((1, 4, 6), float("nan"))}
    with pytest.raises(UserError, match="features 'tokens' of images \\[0\\] are not finite"):
        tables(13).update(torch.tensor([0]), broken, torch.rand(1, 3, 16, 16))


def test_a_reader_learns_of_copies_and_of_unseen_classes():
    train, held_out = blobs(20), blobs(6, seed=1)
    held_out.vectors[0] = train.vectors[3]
    held_out.labels[4:] = 7
    copies, unseen = probe_caveats({"pixels": train}, {"pixels": held_out})
    assert copies.startswith("1 of 6 held-out pictures equal training pictures")
    assert unseen.startswith("2 held-out pictures of classes without")
    assert probe_caveats({"pixels": train}, {"pixels": blobs(6, seed=2)}) == []


class Relabelled(ImageSource):
    """Emoji under other labels."""

    def __init__(self, labels: list[int], class_names: tuple[str, ...] = ("a", "b"), name="r"):
        self.source, self._labels = Emoji("held-out"), torch.tensor(labels)
        self.name, self.class_names = name, class_names

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int):
        return self.source[index]

    def labels(self) -> torch.Tensor:
        return self._labels


@pytest.mark.parametrize(
    ("training", "held_out", "message"),
    [
        (Relabelled([0, 0]), Emoji("held-out"), "all of one class"),
        (Emoji("train"), Relabelled([1, 1]), "all of one class"),
        (Relabelled([0, 1]), Relabelled([0, 1]), "more than one picture of a class"),
        (Emoji("train"), Relabelled([0, 1]), "different classes, as 'Activities'"),
        (Relabelled([0, 1, 1]), Relabelled([0, 1], ("b", "a")), "the same, in another order"),
        (Emoji("held-out"), Emoji("held-out"), "hold other pictures out"),
    ],
)
def test_sets_that_cannot_be_probed_are_refused(training, held_out, message):
    with pytest.raises(UserError, match=message):
        require_probe_sets(Pictures(training), Pictures(held_out))


def test_sets_of_one_name_and_other_pictures_are_taken():
    other = Relabelled([0, 1, 1])
    other.source = Emoji("train")
    require_probe_sets(Pictures(Relabelled([0, 1, 1])), Pictures(other))
