"""Pictures as files of tokens: a tokenizer of ids is an image codec, an ordered one of any length
(One-D-Piece: Miwa et al., 2025, arXiv:2501.10064, whose rate is that of plain ids).

A `.vtk` file, numbers big-endian:

    offset     bytes                 content
    0          4                     "VTK1": the format and its version
    4          8                     the first bytes of the tokenizer's fingerprint
    12         2                     width of the picture
    14         2                     height of the picture
    16         2                     n, number of tokens
    18         ceil(n bits / 8)      tokens of `bits` each, highest bit first; then zeros
    the end    4                     CRC-32 of all bytes before

The whole picture was resized to the tokenizer's size, its proportions given up; reading resizes
back. An id of V codes takes bits = ceil(log2 V). A factorised token is one number in the mixed
radix of its levels, the first dimension leading. There is no entropy coding: every token has its
known place, so that a file can be cut after any token and closed by a new count and checksum.
"""

import math
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vistok.data.sources import MAX_PIXELS
from vistok.data.transforms import to_float, to_uint8
from vistok.decoding import Noise
from vistok.errors import CheckpointError, UserError
from vistok.images import to_pil
from vistok.metrics import psnr
from vistok.tokenizers import Tokenizer
from vistok.tokens import TokenSpec

FORMAT, VERSION = b"VTK", b"1"
FINGERPRINT = 8  # bytes of it
HEADER = struct.Struct(f">4s{FINGERPRINT}sHHH")
CHECKSUM = struct.Struct(">I")
LARGEST = 2**16 - 1  # of a side, and of the number of tokens

PARTS = 16  # into which a search for a length cuts what is left, all decoded as one batch


@dataclass(frozen=True)
class Stream:
    """What a file holds: the first tokens, (n, ...) as the spec shapes them, of a picture of
    `width` x `height`, and the `fingerprint` (16 hex digits) of the tokenizer."""

    fingerprint: str
    width: int
    height: int
    tokens: Tensor

    def first(self, length: int, spec: TokenSpec) -> "Stream":
        """Return the stream of the first `length` tokens; raise `UserError` unless they decode."""
        spec.first(length)
        held = len(self.tokens) if spec.has_prefixes else spec.num_tokens
        if length > held:
            raise UserError(f"{length} tokens asked for, the file holds {held}")
        return replace(self, tokens=self.tokens[:length])


def bits_per_token(spec: TokenSpec) -> int:
    """Return ceil(log2 V) of V different tokens, at least 1; raises `UserError` for latents."""
    if spec.kind == "latents":
        raise UserError(f"{spec} have no codes to write: only ids and factorised ids make files")
    return max(1, (math.prod(_radices(spec)) - 1).bit_length())


def payload_size(spec: TokenSpec, length: int) -> int:
    """Return the bytes that `length` tokens take."""
    return -(-bits_per_token(spec) * length // 8)


def file_size(spec: TokenSpec, length: int) -> int:
    """Return the bytes of a file of `length` tokens, whatever the picture."""
    return HEADER.size + payload_size(spec, length) + CHECKSUM.size


def longest_within(spec: TokenSpec, size: int) -> int:
    """Return how many tokens a file of at most `size` bytes can hold; raises `UserError` where not
    even the fewest that decode fit."""
    fewest = file_size(spec, spec.lengths[0])
    if size < fewest:
        raise UserError(
            f"{size} bytes: the smallest file of {spec} takes {fewest}, "
            f"{HEADER.size + CHECKSUM.size} of them around the tokens"
        )
    bits = 8 * (size - HEADER.size - CHECKSUM.size)
    return spec.lengths[bisect_right(spec.lengths, bits // bits_per_token(spec)) - 1]


def dumps(stream: Stream, spec: TokenSpec) -> bytes:
    """Return the bytes of a file; raises `UserError` for what its fields cannot hold."""
    digits = stream.tokens.reshape(-1, len(_radices(spec))).tolist()
    if max(stream.width, stream.height, len(digits)) > LARGEST:
        raise UserError(
            f"{len(digits)} tokens of a picture {stream.width} x {stream.height}: a file holds up "
            f"to {LARGEST} of each"
        )
    bits, number = bits_per_token(spec), 0
    for digit in digits:
        symbol = 0
        for value, radix in zip(digit, _radices(spec), strict=True):
            symbol = symbol * radix + value
        number = number << bits | symbol
    number <<= -len(digits) * bits % 8
    fingerprint = bytes.fromhex(stream.fingerprint)
    size = stream.width, stream.height
    head = HEADER.pack(FORMAT + VERSION, fingerprint, *size, len(digits))
    body = head + number.to_bytes(payload_size(spec, len(digits)), "big")
    return body + CHECKSUM.pack(zlib.crc32(body))


def loads(data: bytes, spec: TokenSpec, fingerprint: str, where: str) -> Stream:
    """Read a file of the tokenizer with `spec` and `fingerprint`; raises `UserError`, which names
    `where`, for a file that is foreign, damaged, cut off, newer, or of another tokenizer."""
    kind, version = data[: len(FORMAT)], data[len(FORMAT) : len(FORMAT + VERSION)]
    if kind != FORMAT or not version.isdigit():
        raise UserError(
            f"{where}: not a .vtk file, which begins with {(FORMAT + VERSION).decode()}"
        )
    if version != VERSION:
        raise UserError(
            f"{where}: written in format {version.decode()}, this vistok reads format "
            f"{VERSION.decode()}: upgrade vistok"
        )
    body, checksum = data[: -CHECKSUM.size], data[-CHECKSUM.size :]
    if len(body) < HEADER.size or CHECKSUM.pack(zlib.crc32(body)) != checksum:
        raise UserError(
            f"{where}: damaged or cut off, its {len(data)} bytes do not fit their checksum"
        )
    _, made_by, width, height, length = HEADER.unpack_from(body)
    if made_by.hex() != fingerprint:
        raise UserError(
            f"{where}: made by tokenizer {made_by.hex()}, this one is {fingerprint}: give the "
            "tokenizer that made it"
        )
    if not (1 <= width * height <= MAX_PIXELS and length):
        raise UserError(f"{where}: {length} tokens of a picture {width} x {height}")
    shape = spec.first(length).tensor_shape
    payload = body[HEADER.size :]
    if len(payload) != payload_size(spec, length):
        raise UserError(
            f"{where}: {len(payload)} bytes of tokens, {length} take {payload_size(spec, length)}"
        )
    bits = bits_per_token(spec)
    number = int.from_bytes(payload, "big") >> (-length * bits % 8)
    symbols = [number >> bits * i & (1 << bits) - 1 for i in reversed(range(length))]
    if max(symbols) >= math.prod(_radices(spec)):
        raise UserError(f"{where}: token {max(symbols)} is not one of {spec}")
    digits = torch.tensor([_digits(symbol, _radices(spec)) for symbol in symbols])
    return Stream(fingerprint, width, height, digits.reshape(shape))


class Codec:
    """Pictures of any size to streams of one tokenizer's tokens, and back.

    Raises `CheckpointError` for a tokenizer that makes no ids, makes videos or reads captions.

    Args:
        model: the tokenizer.
    """

    def __init__(self, model: Tokenizer):
        name = type(model).__name__
        if model.spec.kind == "latents":
            raise CheckpointError(f"{name} makes {model.spec}: only ids make files")
        if model.frames is not None or model.text_shape is not None:
            reads = "videos" if model.frames is not None else "captions, which files do not hold"
            raise CheckpointError(f"{name} works on {reads}: give a tokenizer of pictures alone")
        self.model = model
        self.spec = model.spec

    @cached_property
    def fingerprint(self) -> str:
        """What files say of the tokenizer, as hex digits."""
        return self.model.fingerprint()[: 2 * FINGERPRINT]

    def fitted(self, image: Image.Image) -> UInt8[Tensor, "3 h w"]:
        """Return a picture (RGB) at the tokenizer's size, as bytes."""
        height, width = self.model.image_size
        return to_uint8(to_float(image.resize((width, height), Image.Resampling.BICUBIC)))

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> Stream:
        """Return all tokens of a picture (RGB)."""
        pixels = self.fitted(image).to(self.model.device) / 255
        tokens = self.model.encode(pixels[None])[0].cpu()
        return Stream(self.fingerprint, *image.size, tokens)

    def decode(self, stream: Stream) -> Image.Image:
        """Return the picture at its original size; equal streams make equal pictures."""
        (picture,) = to_pil(self._images(stream.tokens[None]))
        return picture.resize((stream.width, stream.height), Image.Resampling.BICUBIC)

    def psnr(self, stream: Stream, image: Image.Image, lengths: Sequence[int]) -> list[float]:
        """Return the PSNR in dB of the first `lengths` tokens against a picture, both as bytes of
        the tokenizer's size, all decoded as one batch."""
        tokens = stream.tokens.expand(len(lengths), *stream.tokens.shape)
        if self.spec.has_prefixes:
            tokens = tokens[:, : max(lengths)]
        uniform = min(lengths) == max(lengths)
        images = self._images(tokens, None if uniform else torch.tensor(lengths))
        original = self.fitted(image).expand(len(lengths), -1, -1, -1)
        return psnr(to_uint8(images).cpu() / 255, original / 255).tolist()

    @torch.inference_mode()
    def _images(self, tokens: Tensor, lengths: Tensor | None = None) -> Float[Tensor, "b 3 h w"]:
        # Each row draws as image 0 does, whatever its length: files hold no noise.
        device = self.model.device
        lengths = None if lengths is None else lengths.to(device)
        noise = Noise(0, [0] * len(tokens))
        return self.model.decode(tokens.to(device), lengths, noise=noise)


def shortest_reaching(
    score: Callable[[Sequence[int]], Sequence[float]], spec: TokenSpec, target: float
) -> int:
    """Return a length whose score reaches `target` while that of the one before does not.

    As quality rises with length, but for single steps, that is the shortest. `score` takes up to
    `PARTS` lengths at once. Raises `UserError`, naming the best score met, where none reaches it.
    """
    low, high = -1, len(spec.lengths) - 1
    places = _parts(low, high)
    values = score([spec.lengths[place] for place in places])
    if not max(values) >= target:
        best = max((value, spec.lengths[p]) for value, p in zip(values, places, strict=True))
        raise UserError(
            f"{target:g} dB is out of reach: the best is {best[0]:.2f} at {best[1]} tokens"
        )
    while True:
        reached = next(i for i, value in enumerate(values) if value >= target)
        low, high = ([low, *places][reached], places[reached])
        if high - low == 1:
            return spec.lengths[high]
        # What reaches it is known of the last of them.
        places = _parts(low, high)
        values = [*score([spec.lengths[place] for place in places[:-1]]), target]


def _parts(low: int, high: int) -> list[int]:
    """Return up to `PARTS` numbers above `low`, evenly spread, the last of them `high`."""
    return sorted({low + -(-(high - low) * i // PARTS) for i in range(1, PARTS + 1)})


def _radices(spec: TokenSpec) -> tuple[int, ...]:
    return (spec.vocab_size,) if spec.kind == "ids" else spec.levels


def _digits(symbol: int, radices: Sequence[int]) -> list[int]:
    digits = []
    for radix in reversed(radices):
        symbol, digit = divmod(symbol, radix)
        digits.append(digit)
    return digits[::-1]
