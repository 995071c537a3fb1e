import json
import os

import pytest
import torch

from vistok.data import (
    CaptionSpec,
    Stream,
    TokenCache,
    TokenCacheHeader,
    TokenCacheWriter,
    Transform,
    make_loader,
)
from vistok.errors import UserError
from vistok.tokens import TokenSpec

COUNT, LENGTH, DIM = 7, 5, 4
LENGTHS = torch.tensor([5, 1, 0, 3, 4, 2, 0])
MASK = torch.arange(LENGTH) >= LENGTH - LENGTHS[:, None]
FEATURES = (
    torch.randn(COUNT, LENGTH, DIM, generator=torch.Generator().manual_seed(0)) * MASK[..., None]
)


def header(**changes) -> TokenCacheHeader:
    fields = {"captions": CaptionSpec("some/t5", LENGTH, DIM)}
    spec, crop = TokenSpec.ids((2, 3), 100), Transform("random-flip", 32)
    return TokenCacheHeader("f00d", spec, crop, "test", ("a", "b"), COUNT, **fields | changes)


def write(directory, *ranges: tuple[int, int]) -> None:
    """Write each range by a writer of its own, as a process does, in steps of two pictures."""
    for start, end in ranges:
        writer = TokenCacheWriter(directory, header())
        for i in range(start, end, 2):
            part = slice(i, min(i + 2, end))
            labels = torch.zeros(COUNT, dtype=torch.int64)[part]
            tokens = torch.zeros(len(labels), 1, 2, 3, dtype=torch.int64)
            writer.write(i, tokens, labels, FEATURES[part], MASK[part])


def written(directory, *ranges: tuple[int, int]) -> TokenCache:
    writer = TokenCacheWriter(directory, header())
    writer.allocate()
    write(directory, *ranges)
    writer.finish()
    return TokenCache(directory)


@pytest.mark.parametrize("ranges", [[(0, 7)], [(3, 7), (0, 3)], [(5, 7), (0, 2), (2, 5)]])
def test_what_is_written_is_read(tmp_path, ranges):
    cache = written(tmp_path, *ranges)
    assert cache.header == header()
    cache.check_captions(LENGTH, DIM)
    for i in range(COUNT):
        item = cache.get(i, torch.Generator())
        assert torch.equal(item["captions"], FEATURES[i].half())
        assert torch.equal(item["caption_mask"], MASK[i])


def test_ids_are_read_as_they_were_written(tmp_path):
    given = header(captions=CaptionSpec("some/llama", LENGTH, None))
    writer = TokenCacheWriter(tmp_path, given)
    writer.allocate()
    ids = torch.arange(COUNT * LENGTH).view(COUNT, LENGTH) + 32000
    labels, tokens = torch.zeros(COUNT).long(), torch.zeros(COUNT, 1, 2, 3).long()
    with pytest.raises(UserError, match="expected 5 ids of some/llama"):
        writer.write(0, tokens, labels, FEATURES, MASK)
    writer.write(0, tokens, labels, ids, MASK)
    writer.finish()
    cache = TokenCache(tmp_path)
    assert cache.header == given
    cache.check_captions(LENGTH, None)
    with pytest.raises(UserError, match=r"holds captions 5 ids of some/llama, .* takes 5 x 4"):
        cache.check_captions(LENGTH, DIM)
    for i in range(COUNT):
        item = cache.get(i, torch.Generator())
        assert torch.equal(item["captions"], ids[i] * MASK[i])
        assert torch.equal(item["caption_mask"], MASK[i])


def test_only_real_tokens_are_stored(tmp_path):
    written(tmp_path, (0, 4), (4, 7))
    content = sum(f.stat().st_size - 128 for f in tmp_path.glob("captions-*.npy"))
    assert content == 2 * DIM * LENGTHS.sum()
    assert sorted(f.name for f in tmp_path.glob("caption*")) == [
        "caption_ends.npy", "captions-000000000000.npy", "captions-000000000004.npy",
    ]  # fmt: skip


def test_a_cache_begun_anew_keeps_nothing(tmp_path):
    TokenCacheWriter(tmp_path, header()).allocate()
    write(tmp_path, (0, 2), (4, 6))
    written(tmp_path, (0, 7))
    assert len(list(tmp_path.glob("captions-*.npy"))) == 1


def test_captions_are_collated(tmp_path):
    stream = Stream(written(tmp_path, (0, 7)), seed=0)
    options = {"start_step": 0, "num_steps": 2, "batch_size": 3}
    plain, workers = (list(make_loader(stream, **options, num_workers=w)) for w in (0, 2))
    for batch in plain:
        assert torch.equal(batch["captions"], FEATURES[batch["index"]].half())
        assert torch.equal(batch["caption_mask"], MASK[batch["index"]])
    for a, b in zip(plain, workers, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_cache_without_captions_is_as_it_was(tmp_path):
    plain = header(captions=None)
    assert "captions" not in json.loads(plain.to_json())
    writer = TokenCacheWriter(tmp_path, plain)
    writer.allocate()
    tokens, labels = torch.zeros(COUNT, 1, 2, 3, dtype=torch.int64), LENGTHS
    with pytest.raises(UserError, match="the header says captions None"):
        writer.write(0, tokens, labels, FEATURES, MASK)
    writer.write(0, tokens, labels)
    writer.finish()
    cache = TokenCache(tmp_path)
    assert set(cache.get(0, torch.Generator())) == {"tokens", "label", "index"}
    with pytest.raises(UserError, match="holds no captions"):
        cache.check_captions(LENGTH, DIM)


def test_captions_of_another_size_are_refused(tmp_path):
    cache = written(tmp_path / "cache", (0, 7))
    with pytest.raises(UserError, match="holds captions 5 x 4 of some/t5, the generator takes 5 x"):
        cache.check_captions(LENGTH, 9)
    writer = TokenCacheWriter(tmp_path, header())
    writer.allocate()
    tokens, labels = torch.zeros(2, 1, 2, 3, dtype=torch.int64), torch.tensor([0, 1])
    for captions, message in [
        ((), "the header says captions 5 x 4"),
        ((FEATURES[:2, 1:], MASK[:2, 1:]), r"got captions \(2, 4, 4\), expected 5 x 4"),
        ((FEATURES[:2] + 1e6, MASK[:2]), r"pictures 0\.\.1 are not finite in half"),
    ]:
        with pytest.raises(UserError, match=message):
            writer.write(0, tokens, labels, *captions)


def test_pictures_written_twice_are_refused(tmp_path):
    with pytest.raises(UserError, match="18 rows of captions for 15 tokens"):
        written(tmp_path, (0, 7), (3, 4))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("caption_ends.npy", lambda path: path.unlink(), "caption_ends.npy: missing"),
        ("captions-000000000003.npy", lambda path: path.unlink(), "6 rows of captions in 1 file"),
        (
            "captions-000000000003.npy",
            lambda path: os.truncate(path, path.stat().st_size - 2),
            "captions-000000000003.npy: missing, truncated or no array",
        ),
        (
            "header.json",
            lambda path: path.write_text(path.read_text().replace('"dim": 4', '"dim": 5')),
            r"holds float16 \(6, 4\), the header says float16 \(None, 5\)",
        ),
        (
            "header.json",
            lambda path: path.write_text(path.read_text().replace('"encoder"', '"encodr"')),
            "not a cache's header",
        ),
    ],
)
def test_damaged_captions_are_refused(tmp_path, name, damage, message):
    written(tmp_path, (0, 3), (3, 7))
    damage(tmp_path / name)
    with pytest.raises(UserError, match=message):
        TokenCache(tmp_path)
