"""vistok compress: a picture as a file of tokens.

vistok compress photo.jpg --tokenizer DIR -o photo.vtk --tokens 64
vistok compress photo.jpg --tokenizer DIR --bytes 100
vistok compress photo.jpg --tokenizer DIR --psnr 25
"""

from functools import partial
from pathlib import Path

from accelerate import Accelerator

from vistok.codec import Codec, dumps, longest_within, payload_size, shortest_reaching
from vistok.data.sources import read_image
from vistok.errors import UserError
from vistok.files import replaced
from vistok.tokenizers import Tokenizer


def main(
    image: str,
    tokenizer: str,
    output: str | None = None,
    tokens: int | None = None,
    bytes: int | None = None,
    psnr: float | None = None,
) -> None:
    """Write a picture of any size as a file of tokens: all of them, or by one of --tokens, --bytes
    and --psnr as many of the first as it allows or needs.

    Args:
        image: picture to read
        tokenizer: directory or Hub repository of the tokenizer, which `vistok decompress` needs too
        output: file to write; by default the picture's name with .vtk
        tokens: how many to keep, where the tokenizer is ordered
        bytes: size that the file may have
        psnr: quality to reach, in dB at the tokenizer's size, with as few tokens as it takes
    """
    if sum(wish is not None for wish in (tokens, bytes, psnr)) > 1:
        raise UserError("give one of --tokens, --bytes and --psnr")
    picture = read_image(Path(image), image)
    codec = Codec(Tokenizer.from_pretrained(tokenizer).to(Accelerator().device).eval())
    stream, spec = codec.encode(picture), codec.spec
    quality = partial(codec.psnr, stream, picture)
    if bytes is not None:
        tokens = longest_within(spec, bytes)
    elif psnr is not None:
        tokens = shortest_reaching(quality, spec, psnr)
    length = spec.num_tokens if tokens is None else tokens
    content = dumps(stream.first(length, spec), spec)
    path = Path(output) if output else Path(image).with_suffix(".vtk")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as aside:
        aside.write_bytes(content)
    height, width = codec.model.image_size
    print(
        f"{image}, {picture.width} x {picture.height}: {length} of {spec.num_tokens} tokens, "
        f"{len(content)} bytes ({payload_size(spec, length)} of tokens), "
        f"{8 * len(content) / (picture.width * picture.height):.4g} bits per pixel, "
        f"PSNR {quality([length])[0]:.2f} dB at {width} x {height}: {path}"
    )
