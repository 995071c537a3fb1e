"""Files of tokens: every bit has its place, every fault its line."""

import struct
import zlib

import pytest
import torch
from PIL import Image

from vistok import FSQ, LARP, VQ, ConvTokenizer, TiTok, TokenSpec
from vistok.codec import (
    Codec,
    Stream,
    bits_per_token,
    dumps,
    file_size,
    loads,
    longest_within,
    payload_size,
    shortest_reaching,
)
from vistok.errors import UserError

KEY = "0123456789abcdef"
SPECS = [
    TokenSpec.ids((7,), 2, ordered=True),
    TokenSpec.ids((32,), 4096, ordered=True),
    TokenSpec.ids((5,), 1000, ordered=True),
    TokenSpec.ids((300,), 257, ordered=True),
    TokenSpec.ids((3,), 1, ordered=True),
    TokenSpec.ids((4, 4), 65536),
    TokenSpec.ids(((1, 1), (2, 2), (3, 3)), 4097),
    TokenSpec.factorised((6,), (3, 5, 7), ordered=True),
    TokenSpec.factorised((2, 2), (64,) * 16),  # more than 64 bits a token
]


def stream(spec: TokenSpec, length: int | None = None, seed: int = 0) -> Stream:
    generator = torch.Generator().manual_seed(seed)
    shape = spec.first(spec.num_tokens if length is None else length).tensor_shape
    levels = torch.tensor(spec.levels or (spec.vocab_size,))
    digits = torch.rand(*shape, generator=generator).mul(levels if spec.levels else levels[0])
    return Stream(KEY, 640, 480, digits.long())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_written_is_read(spec):
    for length in {*spec.lengths[:2], *spec.lengths[-2:]} if spec.has_prefixes else {None}:
        written = stream(spec, length)
        content = dumps(written, spec)
        read = loads(content, spec, KEY, "a.vtk")
        assert (read.fingerprint, read.width, read.height) == (KEY, 640, 480)
        assert torch.equal(read.tokens, written.tokens)
        assert dumps(read, spec) == content


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_size_formula_is_exact(spec):
    for length in spec.lengths:
        content = dumps(stream(spec, length), spec)
        assert len(content) == file_size(spec, length) == 22 + payload_size(spec, length)
    whole = file_size(spec, spec.num_tokens)
    assert longest_within(spec, whole) == longest_within(spec, whole + 1000) == spec.num_tokens


def test_whole_scales_fit_a_size():
    spec = TokenSpec.ids(((1, 1), (2, 2), (3, 3)), 256, ordered=True)
    sizes = [file_size(spec, length) for length in (1, 5, 14)]
    assert [longest_within(spec, size) for size in range(sizes[0], sizes[2])] == [1] * 4 + [5] * 9
    for target, length in ((0.5, 1), (1.5, 5), (5.0, 5), (5.5, 14), (14.0, 14)):
        assert (
            shortest_reaching(lambda lengths: [float(n) for n in lengths], spec, target) == length
        )


def test_the_longest_length_is_found_for_every_size():
    spec = TokenSpec.ids((40,), 1000, ordered=True)
    for size in range(file_size(spec, 1), file_size(spec, 40)):
        length = longest_within(spec, size)
        assert file_size(spec, length) <= size < file_size(spec, length + 1)
    with pytest.raises(UserError, match="takes 24, 22 of them around the tokens"):
        longest_within(spec, 23)
    with pytest.raises(UserError, match="8x8 ids of 4096 takes 118"):
        longest_within(TokenSpec.ids((8, 8), 4096), 117)


def test_the_layout_is_the_documented_one():
    spec = TokenSpec.ids((3,), 1000, ordered=True)
    content = dumps(Stream(KEY, 640, 480, torch.tensor([0b1000000001, 0b11, 999])), spec)
    fields = struct.unpack(">4s8sHHH4sI", content)
    bits = "1000000001" + "0000000011" + f"{999:010b}" + "00"
    payload = int(bits, 2).to_bytes(4, "big")
    expected = (b"VTK1", bytes.fromhex(KEY), 640, 480, 3, payload, zlib.crc32(content[:-4]))
    assert fields == expected
    two = dumps(
        Stream(KEY, 1, 1, torch.tensor([[2, 4], [1, 0]])), TokenSpec.factorised((2,), (3, 5))
    )
    assert bits_per_token(TokenSpec.factorised((2,), (3, 5))) == 4
    assert two[18:-4] == bytes([(2 * 5 + 4) << 4 | 1 * 5])


def test_prefixes_of_a_stream_are_shorter_files():
    spec = SPECS[1]
    whole = stream(spec)
    for length in (1, 5, 32):
        assert torch.equal(whole.first(length, spec).tokens, whole.tokens[:length])
        short = dumps(whole.first(length, spec), spec)
        shared = 18 + 12 * length // 8  # whole bytes up to the cut
        assert short[18:shared] == dumps(whole, spec)[18:shared]
    with pytest.raises(UserError, match="1 to 32"):
        whole.first(0, spec)
    with pytest.raises(UserError, match="6 tokens asked for, the file holds 5"):
        whole.first(5, spec).first(6, spec)
    grid = SPECS[5]
    assert torch.equal(stream(grid).first(16, grid).tokens, stream(grid).tokens)
    with pytest.raises(UserError, match="all 16"):
        stream(grid).first(4, grid)


@pytest.mark.parametrize("length", [1, 9])
def test_damage_at_any_byte_and_a_cut_at_any_byte_are_seen(length):
    spec = TokenSpec.ids((9,), 1000, ordered=True)
    content = dumps(stream(spec, length), spec)
    broken = [content[:end] for end in range(len(content))]
    for place in range(len(content)):
        for flip in (1, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[place] ^= flip
            broken.append(bytes(damaged))
    for data in [*broken, content + b"\0", b"", b"VT", b"\x89PNG\r\n" + bytes(40)]:
        with pytest.raises(UserError, match=r"^a\.vtk: ") as caught:
            loads(data, spec, KEY, "a.vtk")
        assert "\n" not in str(caught.value)


def closed(body: bytes) -> bytes:
    """A file whose checksum fits."""
    return body + struct.pack(">I", zlib.crc32(body))


def test_each_fault_has_its_line():
    spec = TokenSpec.ids((9,), 1000, ordered=True)
    body = dumps(stream(spec, 3), spec)[:-4]

    def header(kind=b"VTK1", width=640, height=480, length=3) -> bytes:
        return struct.pack(">4s8sHHH", kind, bytes.fromhex(KEY), width, height, length)

    cases = {
        "not a .vtk file": b"GIF89a" + bytes(40),
        "format 2, this vistok reads format 1: upgrade": closed(b"VTK2" + body[4:]),
        "damaged or cut off, its 26 bytes": body + b"\0" * 4,
        "0 tokens of a picture 640 x 480": closed(header(length=0)),
        "3 tokens of a picture 0 x 480": closed(header(width=0) + body[18:]),
        "3 tokens of a picture 65535 x 65535": closed(
            header(width=65535, height=65535) + body[18:]
        ),
        "length 10": closed(header(length=10) + bytes(13)),
        "5 bytes of tokens, 3 take 4": closed(body + b"\0"),
        "token 1023 is not one of 9 ordered ids of 1000": closed(body[:18] + b"\xff" * 4),
    }
    for message, data in cases.items():
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            loads(data, spec, KEY, "a.vtk")
    other = "f" * 16
    with pytest.raises(UserError, match=f"made by tokenizer {KEY}, this one is {other}"):
        loads(closed(body), spec, other, "a.vtk")
    with pytest.raises(UserError, match="up to 65535"):
        dumps(Stream(KEY, 65536, 1, torch.tensor([1])), spec)
    with pytest.raises(UserError, match="only ids and factorised ids"):
        file_size(TokenSpec.latents((9,), 4), 9)


@pytest.mark.parametrize("count", [1, 3, 16, 17, 256, 1000])
def test_the_search_finds_the_shortest(count):
    spec = TokenSpec.ids((count,), 16, ordered=True)
    for needed in {1, 2, count // 2, count - 1, count} & set(range(1, count + 1)):
        asked: list[int] = []

        def score(lengths, asked=asked):
            assert len(lengths) <= 16
            asked.extend(lengths)
            return [float(length) for length in lengths]

        assert shortest_reaching(score, spec, float(needed)) == needed
        assert len(set(asked)) == len(asked) <= 16 + 15 * max(0, (count - 1).bit_length() // 4)
    with pytest.raises(UserError, match=f"out of reach: the best is {count}.00 at {count} tokens"):
        shortest_reaching(lambda lengths: [float(n) for n in lengths], spec, count + 1.0)
    with pytest.raises(UserError, match="out of reach"):
        shortest_reaching(lambda lengths: [float(n) for n in lengths], spec, float("nan"))


def tiny_titok() -> TiTok:
    sizes = {"width": 16, "depth": 1, "heads": 2}
    vit = {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in sizes.items()}
    model = TiTok(VQ(100, 6), 16, 4, num_latent_tokens=20, tail_drop="uniform", **vit)
    for p in model.parameters():  # so large that every token shows
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def tiny_conv() -> ConvTokenizer:
    return ConvTokenizer(
        FSQ((4, 4)),
        image_size=16,
        patch_size=4,
        channels=8,
        channel_multipliers=(1,),
        num_res_blocks=1,
        z_channels=8,
        attention=False,
    ).eval()


def picture(width: int, height: int) -> Image.Image:
    noise = torch.rand(4, 4, 3).mul(255).byte().numpy()
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("model", [tiny_titok, tiny_conv])
@pytest.mark.parametrize("size", [(16, 16), (45, 31)])
def test_a_codec_keeps_size_and_tokens(model, size):
    codec = Codec(model())
    image = picture(*size)
    whole = codec.encode(image)
    codec.spec.check(whole.tokens[None], "here")
    content = dumps(whole, codec.spec)
    decoded = codec.decode(loads(content, codec.spec, codec.fingerprint, "a.vtk"))
    assert decoded.size == size
    assert decoded.tobytes() == codec.decode(whole).tobytes()


def test_lengths_of_one_batch_score_as_each_alone():
    codec = Codec(tiny_titok())
    image = picture(16, 16)
    whole = codec.encode(image)
    lengths = [1, 2, 7, 20]
    together = codec.psnr(whole, image, lengths)
    alone = [codec.psnr(whole, image, [length])[0] for length in lengths]
    assert len(set(alone)) == 4
    assert together == pytest.approx(alone, abs=0.02)  # dB: rounding to bytes may flip a level


def test_tokenizers_of_other_things_are_refused():
    larp = LARP.__new__(LARP)
    torch.nn.Module.__init__(larp)
    larp.spec, larp.frames = TokenSpec.ids((4,), 8), 16
    with pytest.raises(UserError, match="LARP works on videos"):
        Codec(larp)
    titok = tiny_titok()
    titok.text_shape = (8, 16)
    with pytest.raises(UserError, match="captions, which files do not hold"):
        Codec(titok)
    titok.spec = TokenSpec.latents((20,), 4)
    with pytest.raises(UserError, match="only ids make files"):
        Codec(titok)
