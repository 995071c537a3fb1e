"""Small pictures, whole and broken."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encoded(seed: int, size: tuple[int, int] = (20, 16), form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def broken_checksum() -> bytes:
    content = bytearray(encoded(0))
    content[29] ^= 1  # the checksum of the first chunk
    return bytes(content)


BROKEN = {
    "empty.jpg": b"",
    "page.jpg": b"<html><body>404</body></html>",
    "truncated.jpg": encoded(1, form="JPEG")[:-200],
    "checksum.png": broken_checksum(),
    "zero.png": png_header(0, 10),
    "bomb.png": png_header(30_000, 30_000),
    "large.png": png_header(9_000, 9_000),
    "strip.png": encoded(2, size=(20_000, 1)),
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "float.tiff": None,  # made in the folder
    "loop.png": None,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Classes a (3 pictures, one of them deeper) and b (2 pictures)."""
    root = tmp_path / "pictures"
    names = ["a/0.png", "a/1.jpg", "a/deeper/2.PNG", "b/3.webp", "b/4.png"]
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = {"jpg": "JPEG", "webp": "WEBP"}.get(path.suffix[1:], "PNG")
        path.write_bytes(encoded(seed, form=form))
    return root


@pytest.fixture
def faulty_folder(folder: Path) -> Path:
    """`folder` with every file of `BROKEN` among class a."""
    for name, content in BROKEN.items():
        if content is not None:
            (folder / "a" / name).write_bytes(content)
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(folder / "a" / "float.tiff")
    (folder / "a" / "loop.png").symlink_to("loop.png")
    return folder


@pytest.fixture
def broken_names() -> set[str]:
    return set(BROKEN)
