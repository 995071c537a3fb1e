import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from vistok.data import Transform, to_uint8
from vistok.data.transforms import adm_center_crop, adm_resize, random_crop
from vistok.errors import UserError


def noise_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, len(mode))
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(64, 64), (97, 33), (31, 100), (200, 151), (1, 3)])
def test_resize_center_crop_is_torchvisions(size):
    image = noise_image(*size)
    reference = v2.Compose(
        [v2.Resize(32, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(32)]
    )(image)
    expected = torch.from_numpy(np.array(reference)).permute(2, 0, 1)
    assert torch.equal(to_uint8(Transform("resize-center-crop", 32)(image)), expected)


def test_adm_center_crop_step_by_step():
    image = noise_image(151, 137)  # 137 >= 4 * 32: two halvings, to 75 x 68, then to 37 x 34
    halved = image.resize((75, 68), Image.Resampling.BOX).resize((37, 34), Image.Resampling.BOX)
    scale = 32 / 34
    scaled = halved.resize((round(37 * scale), 32), Image.Resampling.BICUBIC)
    assert scaled.size == (35, 32)
    expected = torch.from_numpy(np.array(scaled.crop((1, 0, 33, 32)))).permute(2, 0, 1)
    assert torch.equal(to_uint8(Transform("adm-center-crop", 32)(image)), expected)


def test_adm_resize_enlarges_too():
    assert adm_resize(noise_image(10, 5), 32).size == (64, 32)


def test_random_crop_reaches_its_whole_range():
    left_half_white = Image.new("RGB", (100, 50))
    left_half_white.paste("white", (0, 0, 50, 50))
    stream = generator()
    means = [np.asarray(random_crop(left_half_white, 16, stream)).mean() for _ in range(200)]
    assert min(means) == 0 and max(means) == 255
    shorts = {random_crop(noise_image(16, 16), 16, stream).size for _ in range(5)}
    assert shorts == {(16, 16)}


def test_random_flip_mirrors_half():
    image = noise_image(40, 40)
    plain = Transform("resize-center-crop", 8)(image)
    transform, stream = Transform("random-flip", 8), generator()
    crops = [transform(image, stream) for _ in range(400)]
    mirrored = [torch.equal(crop, plain.flip(-1)) for crop in crops]
    assert all(m or torch.equal(c, plain) for c, m in zip(crops, mirrored, strict=True))
    assert 160 < sum(mirrored) < 240


@pytest.mark.parametrize("name", ["random-crop-flip", "random-flip", "ten-crop"])
def test_randomness_comes_from_the_generator_alone(name):
    image, transform = noise_image(50, 70), Transform(name, 16)
    first = [transform(image, generator(seed)) for seed in range(8)]
    torch.rand(3)
    state = torch.get_rng_state()
    again = [transform(image, generator(seed)) for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert any(not torch.equal(first[0], other) for other in first[1:])
    assert transform.is_random
    with pytest.raises(UserError, match=r"pass it a torch\.Generator"):
        transform(image)


@pytest.mark.parametrize("name", ["adm-center-crop", "resize-center-crop"])
def test_center_crops_need_no_generator(name):
    transform = Transform(name, 16)
    assert not transform.is_random
    crop = transform(noise_image(50, 70))
    assert crop.shape == (3, 16, 16) and crop.dtype == torch.float32 and crop.is_contiguous()
    assert crop.min() >= 0 and crop.max() <= 1


@pytest.mark.parametrize(
    ("name", "size", "enlarged"),
    # The centre lies 1.5, 2, 0.5 and 12.5 pixels from the edge.
    [("ten-crop", 32, 35), ("ten-crop", 40, 44), ("ten-crop-105", 32, 33), ("ten-crop", 256, 281)],
)
def test_ten_crop_is_torchvisions(name, size, enlarged):
    image = noise_image(size + 60, size + 45)
    reference = v2.TenCrop(size)(adm_center_crop(image, enlarged))
    transform = Transform(name, size)
    crops = to_uint8(transform.all_crops(image))
    assert transform.count == len(reference) == len(crops) == 10
    for crop, expected in zip(crops, reference, strict=True):
        assert torch.equal(crop, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert torch.equal(crops[5:9], crops[[1, 0, 3, 2]].flip(-1))


def test_one_of_the_counted_crops_is_drawn():
    image, stream = noise_image(50, 70), generator()
    transform = Transform("adm-center-crop-flips", 16)
    straight, mirrored = transform.all_crops(image)
    assert torch.equal(straight, Transform("adm-center-crop", 16)(image))
    assert torch.equal(mirrored, straight.flip(-1))
    drawn = [torch.equal(transform(image, stream), straight) for _ in range(400)]
    assert 160 < sum(drawn) < 240
    assert Transform("adm-center-crop", 16).all_crops(image).equal(straight[None])


def test_alpha_stays_a_channel():
    crop = Transform("resize-center-crop", 8)(noise_image(20, 20, "RGBA"))
    assert crop.shape == (4, 8, 8)


def test_bytes_survive_the_round_trip():
    every_byte = Image.fromarray(np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3))
    expected = torch.from_numpy(np.array(every_byte)).permute(2, 0, 1)
    image = Transform("adm-center-crop", 16)(every_byte)
    assert torch.equal(to_uint8(image), expected)


def test_to_uint8_clamps_and_rounds():
    values = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 2.0]).reshape(1, 1, 1, 5)
    assert to_uint8(values).flatten().tolist() == [0, 0, 1, 254, 255]
    assert to_uint8(values.double()).dtype == torch.uint8


def test_wrong_arguments():
    with pytest.raises(UserError, match="did you mean 'adm-center-crop'"):
        Transform("adm-centre-crop", 32)
    with pytest.raises(UserError, match="size 0"):
        Transform("random-flip", 0)
    assert str(Transform("random-flip", 32)) == "random-flip at 32 px"
