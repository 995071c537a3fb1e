import itertools
import subprocess
import sys

import pytest
import torch

from vistok.data import (
    EvaluationImages,
    ImageCrops,
    ImageFolder,
    Images,
    PositionSampler,
    Stream,
    Transform,
    make_loader,
    shard_range,
)
from vistok.data.sources import BrokenSampleError
from vistok.data.stream import MAX_SKIPPED, keyed_generator
from vistok.errors import UserError


class Numbers:
    """Sample i holds i and one draw of its generator; those in `broken` cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def get(self, index: int, generator: torch.Generator) -> dict:
        if index in self.broken:
            raise BrokenSampleError(f"number {index}: broken")
        return {"index": index, "draw": torch.rand((), generator=generator)}

    def permutation(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(self.count, generator=generator)


def batches(stream: Stream, **options) -> list[dict]:
    options = {"start_step": 0, "num_steps": 6, "batch_size": 12} | options
    return list(make_loader(stream, **options))


def same(left: list[dict], right: list[dict]) -> bool:
    assert [batch.keys() for batch in left] == [batch.keys() for batch in right]
    return all(torch.equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in a)


def test_each_epoch_is_its_own_permutation():
    stream = Stream(Numbers(10), seed=3)
    epochs = [[stream.index_at(10 * e + i) for i in range(10)] for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = Stream(Numbers(10), seed=4)
    assert [other.index_at(i) for i in range(10)] != epochs[0]


def test_a_position_does_not_depend_on_what_was_read_before():
    positions = list(range(35))
    forward = Stream(Numbers(10), seed=0)
    expected = {p: forward[p] for p in positions}
    backward = Stream(Numbers(10), seed=0)
    torch.rand(5)
    for position in [*reversed(positions), 7, 31, 7]:
        assert backward[position] == expected[position]
    draws = {float(item["draw"]) for item in expected.values()}
    assert len(draws) == len(positions)  # an image is augmented differently in each epoch


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_is_exact(stop):
    # 7 samples and steps of 12: every stop lies inside an epoch.
    stream = Stream(Numbers(7), seed=0)
    whole = batches(stream, accumulation=2)
    again = Stream(Numbers(7), seed=0)
    first = batches(again, num_steps=stop, accumulation=2)
    rest = batches(again, start_step=stop, num_steps=6 - stop, accumulation=2)
    assert same(whole, first + rest)


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (3, 1), (1, 4), (2, 3), (3, 2)])
def test_another_split_sees_the_same_samples_per_step(world, accumulation):
    stream = Stream(Numbers(7), seed=0)
    whole = batches(stream)
    parts = [
        batches(stream, rank=rank, world=world, accumulation=accumulation) for rank in range(world)
    ]
    for step, expected in enumerate(whole):
        micro = range(step * accumulation, (step + 1) * accumulation)
        found = torch.cat([parts[rank][m]["draw"] for m in micro for rank in range(world)])
        assert torch.equal(found, expected["draw"])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_one_epoch_of_steps_takes_each_sample_once(world):
    stream = Stream(Numbers(60), seed=0)
    taken = [
        index
        for rank in range(world)
        for batch in batches(stream, num_steps=2, batch_size=30, rank=rank, world=world)
        for index in batch["index"].tolist()
    ]
    assert sorted(taken) == list(range(60))


def test_workers_change_nothing():
    options = {"num_steps": 4, "accumulation": 2}
    stream = Stream(Numbers(7, broken=(2,)), seed=0)
    assert same(batches(stream, **options), batches(stream, num_workers=2, **options))


def test_the_loader_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    batches(Stream(Numbers(7), seed=0), num_steps=2, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_broken_samples_are_replaced_counted_and_named(caplog):
    stream = Stream(Numbers(10, broken=(2, 5, 6)), seed=1)
    items = [stream[position] for position in range(10)]
    assert items == [stream[position] for position in range(10)]
    order = [stream.index_at(position) for position in range(20)]
    for position, item in enumerate(items):
        readable = next(p for p in range(position, 20) if order[p] not in (2, 5, 6))
        assert item["index"] == order[readable]
        assert item["skipped"] == readable - position
    assert sum(item["skipped"] > 0 for item in items) == 3
    assert {f"number {i}: broken" in caplog.text for i in (2, 5, 6)} == {True}


def test_nothing_readable_stops_training():
    stream = Stream(Numbers(40, broken=tuple(range(40))), seed=0)
    with pytest.raises(UserError, match=f"{MAX_SKIPPED} broken samples in a row, the last number"):
        stream[0]
    with pytest.raises(UserError, match="no samples"):
        Stream(Numbers(0), seed=0)


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(UserError, match=r"global batch size 10 .* take a multiple of 8"):
        PositionSampler(0, 1, 10, accumulation=4, world=2)
    with pytest.raises(UserError, match="global batch size 0"):
        PositionSampler(0, 1, 0)
    sampler = PositionSampler(5, 3, 8, accumulation=2, rank=1, world=2)
    assert len(sampler) == len(list(sampler)) == 6
    assert next(iter(sampler)) == [42, 43]


@pytest.mark.parametrize("n", [0, 1, 4, 101])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_takes_each_item_once(n, world):
    parts = [shard_range(n, rank, world) for rank in range(world)]
    assert list(itertools.chain(*parts)) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_keyed_generators_differ_in_every_key():
    keys = itertools.product((0, 1, -1), ("epoch", "sample"), (0, 1, 10**12))
    states = {bytes(keyed_generator(*key).get_state().numpy()) for key in keys}
    assert len(states) == 18


def test_faulty_pictures_in_training_and_evaluation(faulty_folder, caplog):
    source = ImageFolder(faulty_folder)
    stream = Stream(Images(source, Transform("random-crop-flip", 8)), seed=0)
    items = [stream[position] for position in range(len(source))]
    assert all(item["image"].shape == (3, 8, 8) for item in items)
    readable = {index for index in range(len(source)) if _is_readable(source, index)}
    assert len(readable) == 5 and {item["index"] for item in items} == readable
    assert sum(item["skipped"] > 0 for item in items) == len(source) - 5
    assert all(name in caplog.text for name in ("truncated.jpg", "bomb.png", "loop.png"))
    with pytest.raises(BrokenSampleError):
        list(EvaluationImages(source, Transform("adm-center-crop", 8)))


def _is_readable(source: ImageFolder, index: int) -> bool:
    try:
        source[index]
    except BrokenSampleError:
        return False
    return True


def test_random_crops_are_fixed_and_in_order(folder):
    source, transform = ImageFolder(folder), Transform("random-crop-flip", 8)
    images = ImageCrops(source, transform, crops=3, seed=0)
    first, again = list(images), list(images)
    assert len(images) == len(first) == 5
    assert [item["index"] for item in first] == list(range(5))
    assert [item["label"] for item in first] == source.labels().tolist()
    assert first[0]["image"].shape == (3, 3, 8, 8)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["image"][0], first[0]["image"][1])
    single = zip(ImageCrops(source, transform), EvaluationImages(source, transform), strict=True)
    assert all(torch.equal(a["image"][0], b["image"]) for a, b in single)


@pytest.mark.parametrize(("name", "count"), [("adm-center-crop", 1), ("ten-crop", 10)])
def test_counted_crops_are_all_there(folder, name, count):
    source, transform = ImageFolder(folder), Transform(name, 8)
    images = ImageCrops(source, transform)
    assert images.crops == count
    for index, item in enumerate(images):
        assert torch.equal(item["image"], transform.all_crops(source[index].image))
    with pytest.raises(UserError, match=f"3 crops of '{name}': it makes {count}"):
        ImageCrops(source, transform, crops=3)
    with pytest.raises(UserError, match="0 crops of 'random-flip': it makes 1 or more"):
        ImageCrops(source, Transform("random-flip", 8), crops=0)


def test_every_crop_is_seen_in_training(folder):
    transform = Transform("ten-crop", 24)
    stream = Stream(Images(ImageFolder(folder), transform), seed=0)
    every = transform.all_crops(stream.data.source[2].image)
    seen = [
        next(k for k in range(10) if torch.equal(every[k], stream[p]["image"]))
        for p in range(300)
        if stream.index_at(p) == 2
    ]
    assert len(set(seen)) == 10


def test_a_program_ends_whatever_loaders_it_leaves_open():
    code = """
from vistok.data import Emoji, Images, Stream, Transform, make_loader
stream = Stream(Images(Emoji("held-out"), Transform("random-flip", 16)), 0)
kept = iter(make_loader(stream, start_step=0, num_steps=50, batch_size=2, num_workers=1))
next(kept)
raise SystemExit(3)
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert ended.returncode == 3
