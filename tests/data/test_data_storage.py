"""Tar shards of a store are those of a folder: the same samples, order and index."""

import io
import tarfile
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import encoded

from vistok.data import Images, Stream, TarShards, Transform, make_loader
from vistok.data.storage import find
from vistok.errors import UserError


def tar(first: int, count: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for label in range(first, first + count):
            fields = {"png": encoded(label), "cls": str(label).encode()}
            if label % 2:
                fields["txt"] = f"caption {label}".encode()
            for field, content in fields.items():
                member = tarfile.TarInfo(f"{label:03}.{field}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def bucket() -> str:
    """A bucket in memory with shards of 3, 1 and 4 samples."""
    store = fsspec.filesystem("memory")
    for number, (first, count) in enumerate(((0, 3), (3, 1), (4, 4))):
        store.pipe(f"/bucket/train-{number:02}.tar", tar(first, count))
    yield "memory://bucket"
    store.rm("/bucket", recursive=True)


@pytest.fixture
def folder(bucket, tmp_path) -> Path:
    folder = tmp_path / "folder"
    fsspec.filesystem("memory").get("/bucket", str(folder), recursive=True)
    return folder


@pytest.mark.parametrize("pattern", ["train-{00..02}.tar", "train-*.tar"])
def test_a_store_holds_what_a_folder_holds(bucket, folder, pattern, tmp_path):
    local = TarShards(f"{folder}/{pattern}")
    for place in (bucket, f"file://{folder}"):
        remote = TarShards(f"{place}/{pattern}", index=tmp_path / "index")
        assert remote.labels().equal(local.labels()) and len(remote) == 8
        for index in (7, 0, 3):
            a, b = remote[index], local[index]
            assert a.image.tobytes() == b.image.tobytes()
            assert (a.label, a.caption, a.key) == (b.label, b.caption, b.key)
        orders = [s.permutation(torch.Generator().manual_seed(3)) for s in (remote, local)]
        assert orders[0].equal(orders[1])


def test_the_stream_of_a_store_goes_on_where_it_was(bucket, folder, tmp_path):
    def batches(pattern: str, start: int) -> list[torch.Tensor]:
        source = TarShards(pattern, index=tmp_path / "index")
        stream = Stream(Images(source, Transform("random-crop-flip", 8)), seed=0)
        steps = {"start_step": start, "num_steps": 6 - start, "batch_size": 4}
        loader = make_loader(stream, **steps, accumulation=1, rank=0, world=1, num_workers=0)
        return [batch["image"] for batch in loader]

    whole = batches(f"{folder}/train-*.tar", 0)
    resumed = batches(f"{bucket}/train-*.tar", 4)
    assert all(a.equal(b) for a, b in zip(whole[4:], resumed, strict=True))


def test_the_index_is_kept_by_url_and_version(bucket, tmp_path, monkeypatch):
    pattern = f"{bucket}/train-{{00..02}}.tar"
    TarShards(pattern, index=tmp_path)
    assert len(list(tmp_path.glob("train-*.index.npz"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr("vistok.data.tar_index.scan", None)
        TarShards(pattern, index=tmp_path)
    fsspec.filesystem("memory").pipe("/bucket/train-01.tar", tar(2, 1))
    assert TarShards(pattern, index=tmp_path).labels().tolist() == [0, 1, 2, 2, 4, 5, 6, 7]


def test_what_a_store_lacks_is_said(bucket, tmp_path):
    with pytest.raises(UserError, match=r"no file memory://bucket/no\.tar"):
        TarShards(f"{bucket}/no.tar")
    with pytest.raises(UserError, match=r"train-00\.tar: shards of a store need index=DIRECTORY"):
        TarShards(f"{bucket}/train-00.tar")
    source = TarShards(f"{bucket}/train-00.tar", index=tmp_path)
    fsspec.filesystem("memory").rm("/bucket/train-00.tar")
    with pytest.raises(UserError, match=r"train-00\.tar: cannot be read \(FileNotFoundError"):
        source[0]
    with pytest.raises(UserError, match=r"nothing://a\.tar: cannot be read \(ValueError: Protocol"):
        find("nothing://a.tar")
