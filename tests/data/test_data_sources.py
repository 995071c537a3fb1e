import io

import numpy as np
import pytest
from PIL import Image

from vistok.data.sources import BrokenSampleError, read_image


def saved(image: Image.Image, form: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def pixel(file: io.BytesIO, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = read_image(file, "test")
    assert image.mode == "RGB"
    return image.getpixel(at)


@pytest.mark.parametrize(
    ("mode", "colour", "form", "expected"),
    [
        ("RGB", (10, 20, 30), "PNG", (10, 20, 30)),
        ("L", 77, "PNG", (77, 77, 77)),
        ("LA", (0, 0), "PNG", (255, 255, 255)),
        ("RGBA", (200, 0, 0, 0), "PNG", (255, 255, 255)),
        ("RGBA", (200, 100, 0, 255), "WEBP", (200, 100, 0)),
        ("CMYK", (0, 0, 0, 0), "TIFF", (255, 255, 255)),
        ("1", 1, "PNG", (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_on_white(mode, colour, form, expected):
    image = Image.new(mode, (4, 4), colour)
    assert pixel(saved(image, form, **({"lossless": True} if form == "WEBP" else {}))) == expected


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((1, 0), 1)
    file = saved(image, "PNG", transparency=0)
    assert pixel(file) == (255, 255, 255)
    assert pixel(file, (1, 0)) == (50, 60, 70)


def test_16_bit_grey_keeps_its_high_byte():
    levels = np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)
    image = read_image(saved(Image.fromarray(levels), "PNG"), "test")
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 40_000 >> 8, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.new("RGB", (16, 8), "black")
    upright.paste("white", (0, 0, 8, 4))  # top left quarter
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(saved(stored, "PNG", exif=exif), "test")
    assert np.array_equal(np.asarray(image), np.asarray(upright))


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    file = saved(frames[0], form, save_all=True, append_images=frames[1:])
    assert pixel(file) == (255, 255, 255)


def test_one_pixel_is_a_picture():
    assert pixel(saved(Image.new("RGB", (1, 1), "red"), "PNG")) == (255, 0, 0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BrokenSampleError, match=r"nothing\.png: .*No such file"):
        read_image(tmp_path / "nothing.png", "nothing.png")
