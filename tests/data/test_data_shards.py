import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import encoded

from vistok.data import TarShards
from vistok.data.shards import expand
from vistok.data.sources import BrokenSampleError
from vistok.errors import UserError


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, label: int, **fields: bytes) -> list[tuple[str, bytes]]:
    members = {"png": encoded(label), "cls": str(label).encode(), **fields}
    return [(f"{key}.{field}", content) for field, content in members.items()]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Three shards of 3, 1 and 4 samples with labels 0..7."""
    label = 0
    for number, size in enumerate((3, 1, 4)):
        members = []
        for _ in range(size):
            members += sample(f"dir/{label:03}", label, txt=f"caption {label}\n".encode())
            label += 1
        write_tar(tmp_path / f"train-{number:02}.tar", members)
    return str(tmp_path / "train-{00..02}.tar")


def test_samples_are_read_by_position(shards):
    source = TarShards(shards)
    assert len(source) == 8 and source.num_classes == 8
    assert source.labels().tolist() == list(range(8))
    for position in (7, 0, 3, 4, -1):
        got = source[position]
        assert got.label == position % 8 and got.key == f"dir/{position % 8:03}"
        assert got.caption == f"caption {position % 8}"
        assert got.image.tobytes() == _decoded(position % 8)
    with pytest.raises(IndexError):
        source[8]


def _decoded(seed: int) -> bytes:
    from vistok.data.sources import read_image

    return read_image(io.BytesIO(encoded(seed)), "").tobytes()


def test_the_index_is_read_while_the_shard_is_the_same(shards, monkeypatch, tmp_path):
    first = TarShards(shards)
    assert len(list(tmp_path.glob(".train-*.tar.index.npz"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr("vistok.data.tar_index.scan", None)
        again = TarShards(shards)
    assert [again[i].key for i in range(8)] == [first[i].key for i in range(8)]
    assert again[5].image.tobytes() == first[5].image.tobytes()
    assert TarShards(shards, label_field="none").labels().tolist() == [0] * 8
    write_tar(tmp_path / "train-01.tar", sample("new", 2))
    assert TarShards(shards).labels().tolist() == [0, 1, 2, 2, 4, 5, 6, 7]
    (tmp_path / ".train-01.tar.index.npz").write_bytes(b"PK broken")
    assert TarShards(shards)[3].key == "new"


def test_an_index_never_unpickles(shards, tmp_path):
    class Run:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / ".train-01.tar.index.npz").write_bytes(pickle.dumps(Run()))
    assert len(TarShards(shards)) == 8
    assert not (tmp_path / "ran").exists()


def test_the_order_is_a_permutation_within_windows(shards, monkeypatch):
    monkeypatch.setattr("vistok.data.shards.WINDOW", 2)
    source = TarShards(shards)
    shard_of = [0, 0, 0, 1, 2, 2, 2, 2]
    orders = {
        tuple(source.permutation(torch.Generator().manual_seed(s)).tolist()) for s in range(9)
    }
    assert len(orders) > 5
    for order in orders:
        assert sorted(order) == list(range(8))
        last = shard_of[order[-1]]
        size = shard_of.count(last)
        assert {shard_of[i] for i in order[-size:]} == {last}  # the window of one shard


def test_a_shard_replaced_while_in_use(shards, tmp_path):
    source = TarShards(shards)
    write_tar(tmp_path / "train-00.tar", sample("other", 5))
    with pytest.raises(UserError, match=r"train-00\.tar: was replaced") as error:
        source[0]
    assert not isinstance(error.value, BrokenSampleError)  # training stops instead of skipping


def test_patterns(tmp_path):
    names = ["a-08.tar", "a-09.tar", "a-10.tar", "b-08.tar"]
    for name in names:
        (tmp_path / name).touch()

    def found(pattern: str) -> list[str]:
        return [shard.path.name for shard in expand(f"{tmp_path}/{pattern}")]

    assert found("a-{08..10}.tar") == names[:3]
    assert found("{b,a}-08.tar") == ["b-08.tar", "a-08.tar"]
    assert found("{a,b}-{08..08}.tar") == ["a-08.tar", "b-08.tar"]
    assert found("a-*.tar") == names[:3]
    assert found("b-08.tar") == ["b-08.tar"]
    for pattern in ("a-{08..11}.tar", "c*.tar", "c.tar"):
        with pytest.raises(
            UserError, match=r"no file .*; expected local or mounted tar files, or a URL"
        ):
            found(pattern)


def test_fields_are_guessed_or_named(tmp_path):
    picture = encoded(0)
    meta = json.dumps({"label": 3, "wnid": 5}).encode()
    path = str(
        write_tar(
            tmp_path / "a.tar", [("x.PNG", picture), ("x.seg.png", picture), ("x.json", meta)]
        )
    )
    assert TarShards(path).labels().tolist() == [3]
    assert TarShards(path, label_field="json:wnid").labels().tolist() == [5]
    assert TarShards(path, image_field="seg.png", label_field="none")[0].caption == "0"
    with pytest.raises(UserError, match=r"a\.tar: x: no field webp; found: png, seg\.png, json"):
        TarShards(path, image_field="webp")
    with pytest.raises(UserError, match=r"a\.tar: x: no integer label in json"):
        TarShards(path, label_field="json:missing")
    with pytest.raises(UserError, match="no field cls"):
        TarShards(path, label_field="cls")


def test_num_classes(shards):
    assert TarShards(shards, num_classes=10).num_classes == 10
    with pytest.raises(UserError, match=r"train-02\.tar: dir/007: label 7, expected 0\.\.5"):
        TarShards(shards, num_classes=6)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.png", encoded(0))], "x: no field cls, json; found: png"),
        ([("x.cls", b"0")], "x: no field jpg, jpeg, png, webp; found: cls"),
        ([("x.png", b""), ("x.jpg", b""), ("x.cls", b"0")], "x: more than one field"),
        (sample("x", 0) + sample("y", 1) + sample("x", 2), "key x appears twice"),
        ([("x.png", b""), ("x.PNG", b"")], "x.PNG appears twice"),
        (sample("x", 0, cls=b"cat"), "x: no integer label in cls: 'cat'"),
        (sample("x", 0, cls=b""), "x: no integer label in cls"),
        (sample("x", 0, cls=b"1.5"), "x: no integer label in cls"),
        (sample("x", 0, cls=b"-1"), "x: label -1 is no class number"),
        (sample("x", 0, cls=b"9" * 12), "is no class number"),
        ([("x.png", b""), ("x.json", b'{"label": true}')], "x: label True is no class number"),
        ([("x.png", b""), ("x.json", b"[]")], "x: no integer label in json"),
        *(
            (sample("x", 0, **{suffix: b""}), f"x.{suffix} is a pickle, which could run code")
            for suffix in ("pyd", "pkl", "pickle", "pth", "pt")
        ),
        ([("x.features.PT", b"")], "x.features.PT is a pickle"),
    ],
)
def test_what_is_no_sample_is_refused_by_name(tmp_path, members, message):
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError) as error:
        TarShards(str(path))
    assert message in str(error.value) and "bad.tar" in str(error.value)
    assert not list(tmp_path.glob(".*")), "no index of a refused shard"


@pytest.mark.parametrize("members", [[], [("README", b"text"), (".hidden", b"")]])
def test_shards_without_samples(tmp_path, members):
    path = write_tar(tmp_path / "empty.tar", members)
    with pytest.raises(UserError, match=r"empty\.tar: no sample in 1 shard"):
        TarShards(str(path))


def test_every_truncation_is_noticed(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", sample("x", 0) + sample("y", 1)).read_bytes()
    used = len(whole.rstrip(b"\0"))
    cuts = {0, 100, 512, 700, used - 300, used, used + 511 - (used - 1) % 512}
    for cut in sorted(cuts):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut\.tar: not a whole, uncompressed tar file"):
            TarShards(str(path))


def test_other_files_are_no_tar(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", sample("x", 0)).read_bytes()
    for name, content in {"a.tar.gz": gzip.compress(whole), "b.tar": b"text" * 500}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a whole, uncompressed tar file"):
            TarShards(str(tmp_path / name))


def test_links_and_devices_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in sample("x", 1):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind in [
            ("y.png", tarfile.SYMTYPE),
            ("y.cls", tarfile.LNKTYPE),
            ("z.png", tarfile.CHRTYPE),
            ("w.png", tarfile.FIFOTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
    assert len(TarShards(str(path))) == 1
    assert "4 links, devices or sparse files left out" in caplog.text


def test_names_are_never_paths(tmp_path):
    place = tmp_path / "inner"
    place.mkdir()
    members = sample("../../evil", 0) + sample("/abs/evil", 1)
    source = TarShards(str(write_tar(place / "a.tar", members)))
    assert [source[i].key for i in range(2)] == ["../../evil", "/abs/evil"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        ".a.tar.index.npz",
        "a.tar",
        "inner",
    ]


def test_a_broken_picture_names_shard_and_key(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("x", 0, png=b"<html>"))
    source = TarShards(str(path))
    with pytest.raises(BrokenSampleError, match=r"a\.tar: x: not a picture of a known format"):
        source[0]
