"""What is scored and what it is compared with: sizes, counts and features must fit."""

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data import Emoji, Transform
from vistok.errors import UserError
from vistok.metrics import NpzImages, Pictures, Reference, Statistics, choose, open_pictures
from vistok.metrics.comparison import caveats, set_scores
from vistok.metrics.features import FeatureNetwork


class Means(torch.nn.Module):
    def forward(self, images):
        return (images.float().mean((2, 3)),)


NETWORK = FeatureNetwork(Means(), "means")


def statistics(path, size=(8, 8), label="means", vectors=None) -> str:
    mean, covariance = torch.zeros(3).double(), torch.eye(3).double()
    Statistics(mean, covariance, "cats", label, 50, size, vectors).save(path)
    return str(path)


def folder(path, sizes) -> str:
    path.mkdir()
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 2 * i, 3 * i)).save(path / f"{i}.png")
    return str(path)


def test_folder_and_npz_show_the_same_pictures(tmp_path):
    pictures = Pictures(open_pictures(folder(tmp_path / "pngs", [(12, 8)] * 5)))
    stacked = np.stack([pictures[i][1].permute(1, 2, 0).numpy() for i in range(5)])
    np.savez(tmp_path / "x.npz", arr_0=stacked)
    packed = Pictures(open_pictures(str(tmp_path / "x.npz")))
    assert packed.size == pictures.size == (8, 12)
    assert len(packed) == 5
    for (i, a), (j, b) in zip(pictures, packed, strict=False):
        assert i == j
        assert torch.equal(a, b)
    assert str(pictures) == "pngs, 5 pictures, as they are, 12 x 8"


def test_a_count_takes_pictures_spread_evenly(tmp_path):
    source = open_pictures(folder(tmp_path / "pngs", [(8, 8)] * 10))
    pictures = Pictures(source, Transform("adm-center-crop", 8), count=4)
    assert [int(pixels[0, 0, 0]) for _, pixels in map(pictures.__getitem__, range(4))] == [
        0,
        2,
        5,
        7,
    ]
    assert "4 of 10 pictures, adm-center-crop at 8 px" in str(pictures)
    with pytest.raises(UserError, match="has 10 pictures, asked for 11"):
        Pictures(source, count=11)


def test_pictures_that_do_not_fit_are_refused(tmp_path):
    mixed = Pictures(open_pictures(folder(tmp_path / "mixed", [(8, 8), (9, 8)])))
    with pytest.raises(
        UserError, match=r"1\.png is 9 x 8 and the first picture 8 x 8: give --size"
    ):
        mixed[1]
    with pytest.raises(UserError, match="random"):
        Pictures(Emoji("held-out"), Transform("random-flip", 8))
    with pytest.raises(UserError, match="scores are of RGB"):
        Pictures(Emoji("held-out", "alpha"))[0]
    with pytest.raises(UserError, match="did you mean 'Emoji'"):
        open_pictures("Emojy")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 8, 8, 3)),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros(3, np.uint8),
    ],
)
def test_npz_of_something_else_is_refused(array, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=array)
    with pytest.raises(UserError, match="expected images as uint8"):
        NpzImages(tmp_path / "x.npz")


def open_reference(where, size=(8, 8), with_vectors=True) -> Reference:
    return Reference.open(where, "resize-center-crop", size, NETWORK, with_vectors)


def test_references_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"of pictures 8 x 8, .* are 16 x 16"):
        open_reference(statistics(tmp_path / "a.npz"), size=(16, 16))
    with pytest.raises(UserError, match="made by inception of 3 features, not by means of 3"):
        open_reference(statistics(tmp_path / "b.npz", label="inception"))
    wide = folder(tmp_path / "wide", [(12, 8)] * 2)
    with pytest.raises(UserError, match="the images to compare are 14 x 8"):
        open_reference(wide, size=(8, 14))
    assert open_reference(wide).pictures.size == (8, 8)


def test_adm_files_hold_moments_of_all_and_some_images(tmp_path):
    """FID is of `mu` and `sigma`, what needs vectors of `arr_0`, as in ADM's evaluator."""
    path, pixels = tmp_path / "adm.npz", np.random.RandomState(0).randint(256, size=(6, 8, 8, 3))
    np.savez(path, arr_0=pixels.astype(np.uint8), mu=np.ones(3), sigma=np.eye(3))
    reference = open_reference(str(path))
    assert (reference.count, reference.num_vectors) == (None, 6)
    vectors = torch.randn(6, 3)
    read = Statistics(torch.zeros(3).double(), torch.zeros(3, 3).double(), "", vectors=vectors)
    both = reference.completed(read)
    assert torch.equal(both.mean, torch.ones(3).double())
    assert both.vectors is vectors
    assert open_reference(str(path), with_vectors=False).pictures is None


def test_metrics_are_chosen_by_what_is_at_hand(tmp_path):
    of_sets = ("fid", "is", "kid", "precision_recall")
    moments = open_reference(statistics(tmp_path / "moments.npz"))
    everything = open_reference(statistics(tmp_path / "all.npz", vectors=torch.randn(9, 3)))
    assert choose(None, of_sets, 20, NETWORK, None) == []
    assert choose(None, of_sets, 20, NETWORK, moments) == ["fid"]
    assert choose(None, of_sets, 20, NETWORK, everything) == ["fid", "kid", "precision_recall"]
    assert choose(["psnr"], ("fid", "psnr"), 1, None, None) == ["psnr"]
    for asked, lacks in {
        "fid": "a reference",
        "is": "logits",
        "psnr": "a tokenizer",
    }.items():
        with pytest.raises(UserError, match=f"metric '{asked}' needs .*{lacks}"):
            choose([asked], of_sets, 20, NETWORK, None)
    with pytest.raises(UserError, match="needs pictures as reference"):
        choose(["kid"], of_sets, 20, NETWORK, moments)
    with pytest.raises(UserError, match=r"1 image\(s\) are too few for fid: at least 2"):
        choose(None, of_sets, 1, NETWORK, moments)
    with pytest.raises(UserError, match=r"3 image\(s\) are too few for precision_recall"):
        choose(["precision_recall"], of_sets, 3, NETWORK, everything)


def test_scores_of_a_set_against_itself():
    vectors = torch.randn(40, 3)
    logits = torch.randn(40, 5)
    moments = vectors.double().mean(0), torch.cov(vectors.double().T)
    images = Statistics(*moments, "noise", "means", 40, (8, 8), vectors, logits)
    scores = set_scores(("fid", "is", "kid", "precision_recall"), images, images)
    assert scores["fid"] == pytest.approx(0, abs=1e-6)
    assert scores["precision"] == scores["recall"] == 1
    assert 1 < scores["is"] < 5
    assert set(scores) == {
        "fid",
        "is",
        "is_deviation",
        "kid",
        "kid_deviation",
        "precision",
        "recall",
    }
    assert caveats(["fid"], images, None) == []
    few = Statistics(*moments, "noise", count=3)
    assert caveats(["fid"], few, None) == ["FID of 3 images in 3 dimensions is biased upwards"]
