"""Streaming statistics: equal to the formula, on any number of processes, and safe to read."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from vistok.data import shard_range
from vistok.errors import UserError
from vistok.metrics import Collector, FeatureNetwork, Moments, PairScores, Statistics
from vistok.metrics.statistics import IndexedTable

COUNT, BATCH = 101, 8


class Corners(nn.Module):
    """Features that are pixels: equal whatever the batch."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale), requires_grad=False)

    def forward(self, images):
        vectors = images[:, :, :2, 0].flatten(1) * self.scale
        return vectors, vectors[:, :3]


def corners(scale: float = 1 / 255) -> FeatureNetwork:
    return FeatureNetwork(Corners(scale), "corners")


def images(indices: range) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [
        torch.randint(256, (3, 16, 16), generator=torch.Generator().manual_seed(i)) for i in indices
    ]
    return torch.tensor(indices), torch.stack(rows).to(torch.uint8)


def scan(rank: int, world: int) -> tuple[Statistics, dict[str, float]]:
    collector = Collector(corners(), COUNT, "noise", (16, 16), num_vectors=30)
    pairs = PairScores(COUNT, num_codes=256)
    mine = shard_range(COUNT, rank, world)
    for start in range(mine.start, mine.stop, BATCH):
        indices, pixels = images(range(start, min(start + BATCH, mine.stop)))
        collector.update(indices, pixels)
        pairs.update(indices, pixels, pixels // 2, pixels[:, 0, 0].long())
    return collector.reduce(), pairs.reduce()


def scan_in_process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    result = scan(rank, world)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_statistics_do_not_depend_on_the_number_of_processes(world, tmp_path):
    alone, alone_pairs = scan(0, 1)
    vectors = corners()(images(range(COUNT))[1]).vectors.double().numpy()
    np.testing.assert_allclose(alone.mean, vectors.mean(0), rtol=1e-12)
    np.testing.assert_allclose(alone.covariance, np.cov(vectors, rowvar=False), rtol=1e-9)

    # Forked, as fresh processes would import torch again.
    mp.start_processes(scan_in_process, (world, str(tmp_path)), world, start_method="fork")
    for rank in range(world):
        shared, pairs = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert shared.count == COUNT
        torch.testing.assert_close(shared.mean, alone.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(shared.covariance, alone.covariance, rtol=1e-12, atol=1e-15)
        assert torch.equal(shared.vectors, alone.vectors)
        assert torch.equal(shared.logits, alone.logits)
        assert pairs == alone_pairs


def test_moments_stream_and_merge():
    x = torch.randn(50, 4, dtype=torch.float64) + 100
    one, first, second = Moments(4), Moments(4), Moments(4)
    one.update(x)
    first.update(x[:13])
    second.update(x[13:20])
    second.update(x[20:])
    first.merge(second)
    assert first.count == one.count == 50
    np.testing.assert_allclose(first.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9)
    torch.testing.assert_close(first.covariance, one.covariance, rtol=1e-9, atol=0)
    with pytest.raises(UserError, match="at least 2"):
        _ = Moments(4).covariance


@pytest.mark.parametrize(
    ("batches", "wrong"),
    [([[0, 1], [1, 2]], "row 1 came 2 times"), ([[0], [2]], "row 1 came 0 times")],
)
def test_an_image_counted_twice_or_never_is_an_error(batches, wrong):
    table = IndexedTable(3, 1)
    for batch in batches:
        table.update(torch.tensor(batch), torch.ones(len(batch), 1))
    with pytest.raises(RuntimeError, match=wrong):
        table.all_reduce()


def test_kept_vectors_depend_on_the_count_alone():
    statistics, _ = scan(0, 1)
    everything = corners()(images(range(COUNT))[1]).vectors
    rows = [int((everything == v).all(1).nonzero()[0]) for v in statistics.vectors]
    assert rows == sorted(set(rows))
    assert len(rows) == 30
    assert rows != list(range(30))


def test_features_that_are_not_finite_are_refused():
    network = corners(scale=torch.nan)
    with pytest.raises(UserError, match=r"noise: features of images \[0, 1\] are not finite"):
        Collector(network, 2, "noise", (16, 16)).update(*images(range(2)))


def test_saved_statistics_come_back(tmp_path):
    statistics, _ = scan(0, 1)
    statistics.save(tmp_path / "new" / "reference.npz")
    back = Statistics.load(tmp_path / "new" / "reference.npz")
    assert torch.equal(back.covariance, statistics.covariance)
    assert torch.equal(back.vectors, statistics.vectors)
    about = ("noise", "corners", COUNT, (16, 16))
    assert (back.pictures, back.features, back.count, back.size) == about
    with np.load(tmp_path / "new" / "reference.npz", allow_pickle=False) as adm:
        np.testing.assert_array_equal(adm["mu"], statistics.mean.numpy())


def test_adm_statistics_are_read(tmp_path):
    x = np.random.RandomState(0).randn(30, 4).astype(np.float32)
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    read = Statistics.load(tmp_path / "adm.npz")
    np.testing.assert_allclose(read.covariance, sigma)
    assert read.mean.dtype == torch.float64
    assert read.features is None
    assert read.pictures.startswith("adm.npz (statistics ")
    np.savez(tmp_path / "adm.npz", mu=mu + 1, sigma=sigma)
    assert Statistics.load(tmp_path / "adm.npz").pictures != read.pictures


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def header_only(shape: tuple[int, ...]) -> bytes:
    """An npz whose `mu` promises an array of `shape` and holds nothing."""
    member, file = io.BytesIO(), io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mu.npy", member.getvalue())
        archive.writestr("sigma.npy", member.getvalue())
    return file.getvalue()


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3)}
HOSTILE = {
    "no zip": b"nothing",
    "empty": b"",
    "a pickle": pickle.dumps(Payload()),
    "objects": npz(mu=np.array([Payload()], dtype=object), sigma=np.eye(1)),
    "truncated": npz(**GOOD)[:300],
    "another file": npz(weights=np.zeros(3)),
    "sigma missing": npz(mu=np.zeros(3)),
    "shapes that do not fit": npz(mu=np.zeros(4), sigma=np.eye(3)),
    "integers": npz(mu=np.zeros(3, dtype=int), sigma=np.eye(3)),
    "not finite": npz(mu=np.full(3, np.nan), sigma=np.eye(3)),
    "more than memory": header_only((10**7, 10**7)),
    "a protocol that is no JSON": npz(**GOOD, protocol=np.array("{")),
    "a protocol that says nothing": npz(**GOOD, protocol=np.array(json.dumps({}))),
    "vectors of another size": npz(**GOOD, vectors=np.zeros((5, 4), dtype=np.float32)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reference.npz").write_bytes(HOSTILE[kind])
    with pytest.raises(UserError, match=r"^reference\.npz: "):
        Statistics.load("reference.npz")
    assert [f.name for f in tmp_path.iterdir()] == ["reference.npz"]
    with pytest.raises(UserError, match="no such file"):
        Statistics.load("missing.npz")


def test_member_names_are_not_paths(tmp_path):
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "reference.npz"
    path.write_bytes(npz(**GOOD, **{"../../escaped": np.zeros(1)}))
    assert torch.equal(Statistics.load(path).covariance, torch.eye(3, dtype=torch.float64))
    assert not (tmp_path / "escaped.npy").exists()
