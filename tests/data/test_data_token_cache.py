import dataclasses
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch

from vistok import VQ, ConvTokenizer
from vistok.commands import cache
from vistok.data import (
    ImageFolder,
    Stream,
    TokenCache,
    TokenCacheHeader,
    TokenCacheWriter,
    Transform,
    make_loader,
    shard_range,
)
from vistok.errors import UserError
from vistok.tokens import TokenSpec

TRANSFORM = Transform("random-flip", 32)


GRID = TokenSpec.ids((2, 3), 100)


def header(spec: TokenSpec = GRID, **changes) -> TokenCacheHeader:
    fields = {"count": 7, "crops": 2, "class_names": ("a", "b")}
    return TokenCacheHeader("f00d", spec, TRANSFORM, "test", **fields | changes)


def tokens_of(made: TokenCacheHeader) -> torch.Tensor:
    stream = torch.Generator().manual_seed(0)
    if made.spec.kind == "latents":
        return torch.randn(made.array_shape, generator=stream)
    return torch.randint(
        0, min(made.spec.levels or (made.spec.vocab_size,)), made.array_shape, generator=stream
    )


def written(directory, made: TokenCacheHeader, world: int = 1) -> torch.Tensor:
    tokens = tokens_of(made)
    labels = torch.arange(made.count) % 2
    TokenCacheWriter(directory, made).allocate()
    for rank in reversed(range(world)):
        part = shard_range(made.count, rank, world)
        writer = TokenCacheWriter(directory, made)
        writer.write(part.start, tokens[part.start : part.stop], labels[part.start : part.stop])
    TokenCacheWriter(directory, made).finish()
    return tokens


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (TokenSpec.ids((2, 3), 100), "uint16"),
        (TokenSpec.ids((4,), 2**16), "uint16"),
        (TokenSpec.ids((4,), 2**16 + 1), "int32"),
        (TokenSpec.ids(((1, 1), (2, 2)), 50, ordered=True), "uint16"),
        (TokenSpec.factorised((2, 2), (8, 8, 5)), "uint16"),
        (TokenSpec.latents((2, 2), 3), "float32"),
    ],
)
def test_what_is_written_is_read(tmp_path, spec, dtype):
    made = header(spec)
    tokens = written(tmp_path / "cache", made, world=3)
    cache = TokenCache(tmp_path / "cache")
    cache.check("f00d", Transform("random-flip", 32))
    assert cache.header == made and cache.spec == spec
    assert np.load(tmp_path / "cache" / "tokens.npy").dtype == dtype
    assert json.loads((tmp_path / "cache" / "header.json").read_text())["dtype"] == dtype
    assert len(cache) == 7 and cache.num_classes == 2
    assert cache.labels().tolist() == [0, 1, 0, 1, 0, 1, 0]
    seen = set()
    for draw in range(30):
        item = cache.get(4, torch.Generator().manual_seed(draw))
        assert (item["index"], item["label"]) == (4, 0)
        assert item["tokens"].dtype == (torch.float32 if spec.kind == "latents" else torch.int64)
        seen.add(next(c for c in range(2) if torch.equal(item["tokens"], tokens[4, c])))
        spec.check(item["tokens"][None], "test")
    assert seen == {0, 1}


def test_the_command_writes_every_counted_crop(folder, tmp_path):
    tokenizer = ConvTokenizer(
        VQ(64, 4), 16, channels=8, channel_multipliers=[1, 1], num_res_blocks=1, z_channels=8
    ).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data, crop = ImageFolder(folder), Transform("ten-crop", 16)
    options = {"transform": "ten-crop", "batch_size": 20, "num_workers": 0}
    cache.main(str(tmp_path / "tokenizer"), data, str(tmp_path / "cache"), **options)
    written = TokenCache(tmp_path / "cache")
    written.check(tokenizer.fingerprint(), crop)
    assert written.header.crops == 10 and written.labels().equal(data.labels())
    stored = np.load(tmp_path / "cache" / "tokens.npy").astype(np.int64)
    for index, ids in enumerate(torch.from_numpy(stored)):
        assert torch.equal(ids, tokenizer.encode(crop.all_crops(data[index].image)))


def test_highest_id_survives(tmp_path):
    made = header(TokenSpec.ids((2,), 2**16), count=1, crops=1)
    writer = TokenCacheWriter(tmp_path, made)
    writer.allocate()
    writer.write(0, torch.tensor([[[0, 2**16 - 1]]]), torch.tensor([1]))
    writer.finish()
    item = TokenCache(tmp_path).get(0, torch.Generator())
    assert item["tokens"].tolist() == [0, 2**16 - 1] and item["label"] == 1


def test_latents_in_half_precision(tmp_path):
    made = header(TokenSpec.latents((2,), 4), latent_dtype="float16")
    writer = TokenCacheWriter(tmp_path, made)
    writer.allocate()
    latents = tokens_of(made).bfloat16()
    writer.write(0, latents, torch.zeros(7, dtype=torch.int64))
    writer.finish()
    item = TokenCache(tmp_path).get(3, torch.Generator())
    assert item["tokens"].dtype == torch.float32
    assert any(torch.equal(item["tokens"], crop.float()) for crop in latents[3])


def test_another_tokenizer_or_transform_is_refused(tmp_path):
    written(tmp_path, header())
    cache = TokenCache(tmp_path)
    with pytest.raises(UserError, match=r"another tokenizer .fingerprint f00d, yours is beef"):
        cache.check("beef", TRANSFORM)
    for other in (Transform("random-flip", 64), Transform("adm-center-crop", 32)):
        with pytest.raises(UserError, match=f"made with random-flip at 32 px, yours is {other}"):
            cache.check("f00d", other)


def test_no_header_is_no_cache(tmp_path):
    made = header()
    TokenCacheWriter(tmp_path, made).allocate()
    with pytest.raises(UserError, match="no finished token cache"):
        TokenCache(tmp_path)
    with pytest.raises(UserError, match="no finished token cache"):
        TokenCache(tmp_path / "nowhere")


def test_an_unfinished_cache_is_not_sealed(tmp_path):
    made = header()
    writer = TokenCacheWriter(tmp_path, made)
    writer.allocate()
    tokens, labels = tokens_of(made), torch.zeros(7, dtype=torch.int64)
    writer.write(0, tokens[:3], labels[:3])
    writer.write(5, tokens[5:], labels[5:])
    with pytest.raises(UserError, match="2 of 7 pictures were never written, the first is 3"):
        writer.finish()
    assert not (tmp_path / "header.json").exists()
    writer.write(3, tokens[3:5], labels[3:5])
    writer.finish()
    with pytest.raises(UserError, match="already holds a token cache"):
        writer.allocate()
    assert len(TokenCache(tmp_path)) == 7


def test_wrong_tokens_are_not_written(tmp_path):
    writer = TokenCacheWriter(tmp_path, header())
    writer.allocate()
    labels = torch.zeros(2, dtype=torch.int64)
    good = torch.zeros(2, 2, 2, 3, dtype=torch.int64)
    for start, tokens, message in [
        (0, good + 100, r"ids 100\.\.100, expected 0\.\.99"),
        (0, good - 1, r"ids -1\.\.-1"),
        (6, good, r"pictures 6\.\.7 of a cache of 7"),
        (0, good[:, :1], "got tokens"),
        (0, good.float(), "expected 2x3 ids of 100"),
    ]:
        with pytest.raises(UserError, match=message):
            writer.write(start, tokens, labels)


def _truncate(path):
    os.truncate(path, path.stat().st_size - 4)


def _edit(**changes):
    def edit(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _objects(path):
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    path.write_bytes(file.getvalue())


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokens.npy", _truncate, "tokens.npy: missing, truncated or no array"),
        ("labels.npy", _truncate, "labels.npy: missing, truncated or no array"),
        ("tokens.npy", lambda path: path.unlink(), "tokens.npy: missing"),
        ("tokens.npy", _objects, "tokens.npy: missing, truncated or no array"),
        ("header.json", _edit(count=6), "the header says uint16 .6, 2, 2, 3"),
        ("header.json", _edit(crops=1), "the header says uint16 .7, 1, 2, 3"),
        ("header.json", _edit(format=99), "not a cache's header .format 99"),
        ("header.json", _edit(extra=1), "not a cache's header"),
        ("header.json", _edit(transform=3), "not a cache's header"),
        ("header.json", lambda path: path.write_text("[]"), "not a cache's header"),
        ("header.json", lambda path: path.write_text("{"), "not a cache's header"),
    ],
)
def test_a_damaged_cache_is_refused(tmp_path, name, damage, message):
    written(tmp_path, header())
    damage(tmp_path / name)
    with pytest.raises(UserError, match=message):
        TokenCache(tmp_path)


def test_a_cache_streams_like_pictures(tmp_path):
    written(tmp_path, header())
    stream = Stream(TokenCache(tmp_path), seed=0)
    options = {"start_step": 0, "num_steps": 3, "batch_size": 4}
    plain, workers = (list(make_loader(stream, **options, num_workers=w)) for w in (0, 2))
    assert plain[0]["tokens"].shape == (4, 2, 3)
    for a, b in zip(plain, workers, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_worker_maps_the_files_instead_of_copying_them(tmp_path):
    made = dataclasses.replace(header(), count=5000)
    written(tmp_path, made)
    cache = TokenCache(tmp_path)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert pickle.loads(sent).labels().equal(cache.labels())
