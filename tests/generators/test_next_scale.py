"""The Llama of whole scales: what its rows are fed, corrections, prompts, the work of a pass."""

import pytest
import torch
import torch.nn.functional as F

from vistok.decoding import Corrected, Decoding, Noise, Order, Schedule, decode
from vistok.errors import IncompatibleTokensError, UserError
from vistok.generators import Generator, NextScaleLlama, Prompts
from vistok.generators.llamagen import hide_padding
from vistok.generators.tokenflow import joined
from vistok.layers.pyramid import resized
from vistok.quantizers import FSQ, VQ, MultiScale
from vistok.tokenizers import ConvTokenizer
from vistok.tokens import TokenSpec

SCALES = (1, (1, 2), 3, 4)
SIZES = {"dim": 48, "depth": 2, "num_heads": 4, "num_kv_heads": 2}
TEXT = {
    "text_vocab_size": 9,
    "caption_length": 4,
    "start_ids": (5, 6),
    "end_ids": (7, 1),
    "null_ids": (3, 2, 4),
}
CLASSES = torch.tensor([0, 2, 1])
PROMPTS = Prompts.left_padded([[1], [1, 2, 3, 4, 5], [4, 4]], 4, 8)


def codes_of(scales=SCALES) -> MultiScale:
    return MultiScale(VQ(11, 6), scales, smoothers=0, jointly=False)


def tiny(codes=None, **more) -> NextScaleLlama:
    """A model with random weights everywhere, so that no logit is trivially zero."""
    torch.manual_seed(0)
    codes = codes or codes_of()
    spec = codes.spec(codes.scales[-1])
    model = NextScaleLlama(spec, ["a", "b", "c"], codes, **{**SIZES, **more}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(params=["classes", "prompts"])
def conditioned(request):
    """A model and three conditions."""
    return (tiny(), CLASSES) if request.param == "classes" else (tiny(**TEXT), PROMPTS)


def tokens_of(model, batch=3):
    return torch.randint(11, (batch, model.spec.num_tokens))


@torch.inference_mode()
def test_corrections_are_those_of_a_network_without_cache(conditioned):
    """A correction sees the coarser scales as they were fed at first, and so do finer scales, which
    no correction reaches."""
    model, condition = conditioned
    tokens = tokens_of(model)
    plan = model.plan(Order("next_scale(2)"))
    state = model.new_state(3, plan)
    prefix, n = model.condition.rows, model.spec.num_tokens
    rows = joined(model.sizes, prefix, 0, tokens.device)
    mask, real = rows.mask, model.condition.real_rows(condition)
    if real is not None:
        mask = hide_padding(mask, real, rows.rows, prefix)
    sums = [model.codes.codes(tokens)[0]]
    for codes in model.codes.codes(tokens)[1:]:
        sums.append(codes + resized(sums[-1], codes.shape[1:3], "bicubic"))
    for fed in plan.passes:
        told = model.told(tokens)
        if fed.correction:
            told[:, fed.predict - 1] = sums[fed.rank[0]].flatten(1, 2)
        x = torch.cat([model.prefix(condition), model.rows(told, torch.arange(1, n))], dim=1)
        hidden = model.transformer(x, model.rotary[:, : rows.rows], mask=mask)
        expected = model.norm(hidden[:, prefix - 1 :][:, fed.predict])
        found = model.step(tokens, condition, fed, state)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_corrected_tokens_are_fed_on_and_leave_no_trace(conditioned):
    model, condition = conditioned
    decoding = Decoding(Order("next_scale(1)"), Schedule("linear(1,4)"), top_k=Corrected("5/1"))
    state = model.new_state(6, decoding.plan_of(model))
    runs = [decode(model, condition, Noise(seed, range(3)), decoding, state) for seed in (0, 1, 0)]
    assert torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[1])
    plain = decode(model, condition, Noise(0, range(3)), decoding.changed(plan=Order("next_scale")))
    assert torch.equal(plain[:, :1], runs[0][:, :1]) and not torch.equal(plain, runs[0])


def test_first_scales_are_those_of_all(conditioned):
    model, condition = conditioned
    decoding = Decoding(Order("next_scale(1)"), guidance=Schedule(2))
    whole, first = (
        decode(model, condition, Noise(0, range(3)), decoding.changed(length=length), None)
        for length in (None, 12)
    )
    assert first.shape == (3, 12)
    # Noise of fewer tokens is drawn in other places; the first scale has the first numbers.
    assert torch.equal(first[:, 0], whole[:, 0])


def test_published_passes_and_the_rows_that_a_cache_saves():
    """B's nine scales after 128 ids of a prompt and 4 of a mark. Without a cache each pass feeds
    the prompt and all scales so far anew: 3357 rows, against 948, 817 of them the tokens'."""
    codes = codes_of((1, 2, 4, 6, 8, 10, 12, 14, 16))
    sizes = {"dim": 8, "depth": 1, "num_heads": 1, "num_kv_heads": 1, "hidden_dim": 8}
    text = {**TEXT, "caption_length": 128, "start_ids": (5, 6, 5, 6)}
    model, prompt = tiny(codes, **sizes, **text), Prompts.left_padded([[1]], 128, 8)
    fed = []
    transformer = model.transformer
    model.transformer = lambda x, *rest, **more: (
        fed.append(x.shape[1]),
        transformer(x, *rest, **more),
    )[1]
    for corrections, passes, rows in ((0, 9, 948), (1, 17, 948 + 816), (2, 25, 948 + 2 * 816)):
        fed.clear()
        decoding = Decoding(Order(f"next_scale({corrections})"))
        decode(model, prompt, Noise(0, [0]), decoding)
        assert (len(fed), sum(fed)) == (passes, rows)
        assert len(decoding.plan_of(model)) == passes
    ends = torch.tensor(model.sizes).cumsum(0)
    assert int((132 + ends).sum()) == 3357


# --------------------------------------------------------------------------------------- prompts


def test_padding_of_prompts_is_not_seen():
    model = tiny(**TEXT)
    tokens = tokens_of(model)
    other = Prompts(torch.where(PROMPTS.mask, PROMPTS.ids, 0), PROMPTS.mask)
    with torch.inference_mode():
        expected = model.teacher_forced(tokens, PROMPTS, 2)
        torch.testing.assert_close(model.teacher_forced(tokens, other, 2), expected)
    decoded = [decode(model, p, Noise(0, range(3))) for p in (PROMPTS, other)]
    assert torch.equal(*decoded)
    assert PROMPTS.ids[1].tolist() == [1, 2, 3, 4] and PROMPTS.ids[0].tolist() == [8, 8, 8, 1]


def test_the_null_prompt_is_a_text():
    model = tiny(**TEXT)
    null = model.null_condition(PROMPTS)
    assert null.ids.tolist() == [[8, 3, 2, 4]] * 3 and null.mask.sum() == 9
    both = model.with_null(PROMPTS)
    assert len(both) == 6 and torch.equal(both[3:].ids, null.ids)
    assert torch.equal(both[:3].mask, PROMPTS.mask)
    dropped = model.condition.drop(PROMPTS, torch.tensor([True, False, True]))
    assert torch.equal(dropped.ids[[0, 2]], null.ids[[0, 2]])
    assert torch.equal(dropped.ids[1], PROMPTS.ids[1])


@torch.inference_mode()
def test_texts_and_images_are_one_vocabulary():
    """The loss is that of the rows from the last of the mark on: all codes, then what ends them."""
    model = tiny(**TEXT)
    tokens = tokens_of(model)
    rows = model.embed(tokens, PROMPTS, 2)
    assert rows.shape[1] == 6 + model.spec.num_tokens - 1 + 3
    logits = model.joint_logits(model.teacher_forced(tokens, PROMPTS, 2))
    targets = torch.cat([tokens + 9, torch.tensor([[7, 1]] * 3)], dim=1)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, PROMPTS).loss, loss)
    # What comes after an image changes nothing in it.
    alone = model.head.logits(model.teacher_forced(tokens, PROMPTS))
    torch.testing.assert_close(alone, logits[:, :-2, 9:], atol=1e-4, rtol=1e-4)


def test_conditions_of_other_kinds_are_refused():
    model = tiny(**TEXT)
    for wrong, message in (
        (CLASSES, r"prompts \(B, 4\), not Tensor"),
        (Prompts.left_padded([[1]], 5, 8), r"not prompts \(B, 5\)"),
    ):
        with pytest.raises(UserError, match=message):
            model.condition.check(wrong)
    with pytest.raises(UserError, match="class-conditional"):
        tiny().condition.check(PROMPTS)
    with pytest.raises(UserError, match="text_vocab_size"):
        tiny(start_ids=(1, 2))


# ----------------------------------------------------------------------------------------- codes


def tokenizer(quantizer) -> ConvTokenizer:
    return ConvTokenizer(quantizer, 16, 32, (1, 1, 1), num_res_blocks=1, z_channels=32)


def test_codes_are_taken_from_the_tokenizer(tmp_path):
    frozen = tokenizer(codes_of((1, 2, 4)))
    model = NextScaleLlama(frozen.spec, ["a", "b", "c"], **SIZES)
    tokens = tokens_of(model)
    with pytest.raises(UserError, match="take_codes"):
        model(tokens, CLASSES)
    model.take_codes(frozen)
    before = {name: w.clone() for name, w in model.codes.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    model(tokens, CLASSES).loss.backward()
    optimizer.step()
    with torch.no_grad():
        frozen.quantizer.quantizer.embedding.weight.zero_()
    assert before and all(torch.equal(w, before[k]) for k, w in model.codes.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path)
    assert loaded.fingerprint() == model.fingerprint()


def test_codes_of_other_tokens_are_refused():
    model = NextScaleLlama(codes_of((1, 2, 4)).spec((4, 4)), ["a"], **SIZES)
    for quantizer, message in (
        (VQ(11, 6), "choose a tokenizer whose quantizer is MultiScale"),
        (codes_of((1, 3, 4)), r"was built for 1x1\+2x2\+4x4"),
        (MultiScale(FSQ([3, 3]), (1, 2, 4), smoothers=0), "was built for"),
    ):
        with pytest.raises(IncompatibleTokensError, match=message):
            model.take_codes(tokenizer(quantizer))


def test_scales_begin_with_one_token():
    for scales in (((2, 2), (4, 4)), ((1, 1),)):
        with pytest.raises(IncompatibleTokensError, match="first scale is 1x1"):
            NextScaleLlama(TokenSpec.ids(scales, 11), ["a"], **SIZES)
    with pytest.raises(UserError, match="decodes by next_scale"):
        tiny().plan(Order("raster"))


def test_codes_are_copies_and_stay_those_of_the_tokenizer():
    """Neither a model nor the one that it starts from shares or changes the tokenizer's codes."""
    codes, other = codes_of(), tiny()
    model = tiny(codes)
    assert all(p.requires_grad for p in codes.parameters())
    before = codes.quantizer.embedding.weight.clone()
    torch.nn.init.normal_(other.codes.quantizer.embedding.weight)
    torch.nn.init.normal_(model.codes.quantizer.embedding.weight)
    assert torch.equal(codes.quantizer.embedding.weight, before)
    kept = model.codes.quantizer.embedding.weight.clone()
    model.start_from(other)
    assert torch.equal(model.codes.quantizer.embedding.weight, kept)
    assert torch.equal(model.position_table, other.position_table)
    with pytest.raises(UserError, match="do not fit"):
        model.start_from(tiny(depth=1))
