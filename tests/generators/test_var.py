"""VAR: what it is fed, corrections, and codes that it keeps."""

import pytest
import torch

from vistok.decoding import Corrected, Decoding, Noise, Order, Schedule, decode
from vistok.errors import IncompatibleTokensError, UserError
from vistok.generators import VAR, Generator
from vistok.quantizers import FSQ, VQ, MultiScale
from vistok.tokenizers import ConvTokenizer
from vistok.tokens import TokenSpec

SCALES = (1, 2, (2, 3), 4)
SIZES = {"dim": 24, "depth": 2, "num_heads": 4}
LABELS = torch.tensor([0, 2, 1])


def spread(module):
    """Random weights everywhere, so that no part is trivially zero."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def quantizer(**more):
    vq = VQ(11, 3, l2_normalise=False, commitment=0.0, codebook_weight=0.0)
    return MultiScale(vq, SCALES, **more)


def tiny(**more):
    codes = quantizer()
    return spread(VAR(codes.spec((4, 4)), ["a", "b", "c"], codes, **SIZES, **more)).eval()


@pytest.fixture(
    params=[{}, {"cosine": False}, {"shared_modulation": True, "norm_eps": 1e-3}], ids=str
)
def model(request):
    return tiny(**request.param)


@torch.no_grad()
def test_a_scale_is_told_the_mean_of_the_sum_before(model):
    tokens, codes = torch.randint(11, (3, model.spec.num_tokens)), model.codes
    told = model.told(tokens).split(model.sizes[1:], dim=1)
    for scale, means in enumerate(told):
        total = codes.decode(tokens[:, : model.ends[scale + 1]])
        wanted = codes.shrunk(total, scale + 1).flatten(1, 2)
        torch.testing.assert_close(means, wanted)


@torch.inference_mode()
def test_a_scale_sees_itself_and_those_before(model):
    """Later tokens change nothing, and a row of the same scale does."""
    tokens = torch.randint(11, (3, model.spec.num_tokens))
    hidden = model.teacher_forced(tokens, LABELS)
    for end, seen in zip(model.ends[:-1], model.ends[1:], strict=True):
        other = tokens.clone()
        other[:, end:] = torch.randint(11, other[:, end:].shape)
        torch.testing.assert_close(model.teacher_forced(other, LABELS)[:, :seen], hidden[:, :seen])
    model.position.data[-1] += torch.randn(24)
    changed = model.teacher_forced(tokens, LABELS)
    begin = model.ends[-2]
    torch.testing.assert_close(changed[:, :begin], hidden[:, :begin])
    assert not torch.isclose(changed[:, begin], hidden[:, begin]).all()


@torch.inference_mode()
def test_corrections_are_those_of_a_reference_without_cache(model):
    """A correction is told the sum with its own tokens, and its rows take the place of the first
    ones in what later scales see."""
    decoding = Decoding(
        Order("next_scale(2)"), guidance=Schedule("linear(1,3)"), top_k=Corrected("5/3/1")
    )
    tokens = decode(model, LABELS, Noise(3, range(3)), decoding)
    noise = Noise(3, range(3))
    draws = [noise.uniform(model.spec.num_tokens) for _ in range(3)]
    condition, codes = model.with_null(LABELS), model.codes
    by, head = model.conditioned(condition)
    rows = model.first_rows(condition)
    found = torch.zeros(3, 0, dtype=torch.long)
    for scale, size in enumerate(model.sizes):
        begin, end = model.ends[scale], model.ends[scale + 1]
        for number in range(3 if scale else 1):
            if scale:
                known = found if number else found[:, :begin]
                means = codes.shrunk(codes.decode(known), scale).flatten(1, 2)
                own = model.rows(means, begin).repeat(2, 1, 1)
                rows = torch.cat([rows[:, :begin], own], dim=1)
            level = model.level_of[:end]
            mask = level <= level[:, None]
            hidden = model.transformer(rows, [by] * len(model.blocks), mask=mask)[:, -size:]
            hidden = model.predictive(hidden, head)
            fraction = scale / (len(model.sizes) - 1)
            drawn = model.head.sample(
                hidden[:3],
                hidden[3:],
                decoding.guidance(fraction),
                draws[number][:, begin:end],
                decoding.sampling(fraction, number),
            )
            found = torch.cat([found[:, :begin], drawn], dim=1)
    assert torch.equal(tokens, found)


def test_codes_are_taken_once_and_saved(tmp_path):
    tokenizer = spread(ConvTokenizer(quantizer(), 8, 8, (1, 1), z_channels=4, num_res_blocks=1))
    model = VAR(tokenizer.spec, ["a", "b", "c"], **SIZES).eval()
    tokens = tokenizer.encode(torch.rand(3, 3, 8, 8))
    with pytest.raises(UserError, match="knows no codes"):
        model(tokens, LABELS)
    model.take_codes(tokenizer)
    with torch.no_grad():
        model.head.linear.weight.normal_()
        loss = model(tokens, LABELS).loss
        tokenizer.quantizer.quantizer.embedding.weight.zero_()
    assert model(tokens, LABELS).loss == loss
    assert not any(p.requires_grad for p in model.codes.parameters())
    model.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path).eval()
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded(tokens, LABELS).loss, loss)
    embed = model.code_embed
    model.take_codes(tokenizer)
    assert model.code_embed is embed, "an embedding that is trained stays"


def test_unfit_tokenizers_and_orders_are_refused():
    codes = quantizer()
    model = VAR(codes.spec((4, 4)), ["a"], codes, **SIZES)
    with pytest.raises(IncompatibleTokensError, match="ConvTokenizer does not make"):
        model.take_codes(ConvTokenizer(FSQ([8, 5]), 8, 8, (1, 1), z_channels=4))
    with pytest.raises(IncompatibleTokensError, match=r"makes 1x1\+4x4 .* VAR was built for"):
        model.take_codes(ConvTokenizer(MultiScale(VQ(11, 3), (1, 4)), 8, 8, (1, 1), z_channels=4))
    with pytest.raises(IncompatibleTokensError, match="models tokens of scales"):
        VAR(TokenSpec.ids((4, 4), 11), ["a"], **SIZES)
    with pytest.raises(UserError, match=r"decodes by next_scale .*, not by raster"):
        model.plan(Order("raster"))


def test_a_dropped_branch_adds_nothing_to_an_image():
    model = tiny(drop_path=0.5).train()
    block, x, by = model.blocks[-1], torch.randn(400, 3, 24), torch.randn(400, 1, 24)
    block.attention = torch.nn.Identity()
    out = block(x, by)
    assert block.drop_path == 0.5 and model.blocks[0].drop_path == 0
    unchanged = (out == x).all(-1).all(-1).float().mean()
    assert abs(unchanged - 0.25) < 0.08
    model.eval()
    assert not (block(x, by) == x).all(-1).any()


def test_the_first_scales_decode_alone():
    model = tiny()
    whole, first = (
        decode(model, LABELS, Noise(0, range(3)), Decoding(top_k=Corrected(1), length=length))
        for length in (None, 5)
    )
    assert torch.equal(first, whole[:, :5])
