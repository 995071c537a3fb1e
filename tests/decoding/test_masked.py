"""Masked decoding: its counts, its rule, and what an image depends on."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import log_softmax

from vistok.decoding import (
    Decoding,
    Noise,
    Order,
    Sampling,
    Schedule,
    StoredNoise,
    decode,
    decode_masked,
    sample_categorical,
)
from vistok.decoding.masked import least
from vistok.decoding.sampling import gumbel
from vistok.errors import UserError
from vistok.generators import LlamaGen, MaskGIT
from vistok.tokens import TokenSpec

LABELS = torch.tensor([0, 2, 1])


def tiny(shape=(12,), **more):
    model = MaskGIT(TokenSpec.ids(shape, 13), ["a", "b", "c"], dim=32, depth=2, num_heads=4, **more)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("tokens", "steps", "published"),
    [
        (32, 8, "29 26 24 21 18 14 10"),
        (64, 8, "58 53 48 42 36 29 20"),
        (256, 16, "245 235 225 214 204 193 182 170 158 145 132 117 101 82 57"),
    ],
)
def test_published_numbers_of_masked_tokens(tokens, steps, published):
    plan = Order(f"maskgit({steps})")((tokens,))
    assert plan.masked == (tokens, *map(int, published.split()))
    assert len(plan) == steps
    assert plan.fractions == [t / steps for t in range(steps)]


@pytest.mark.parametrize("schedule", ["arccos", "cosine", "linear", "square", "cubic", "sqrt"])
@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (7, 3), (16, 16), (5, 9), (128, 64)])
def test_every_pass_settles_a_token_while_there_are_two(schedule, tokens, steps):
    masked = Order(f"maskgit({steps},{schedule})")((tokens,)).masked
    assert masked[0] == tokens
    assert len(masked) == steps
    for before, after in pairwise(masked):
        assert 1 <= after <= max(1, before - 1)


def test_other_spellings_and_models_are_refused():
    for spelling in ("maskgit(0)", "maskgit(8,log)"):
        with pytest.raises(UserError, match="arccos, cosine"):
            Order(spelling)((4, 4))
    with pytest.raises(UserError, match="not by raster"):
        tiny().plan(Order("raster"))
    planned = LlamaGen(TokenSpec.ids((12,), 13), ["a"], dim=32, depth=1, num_heads=4)
    with pytest.raises(UserError, match="not by maskgit"):
        planned.plan(Order("maskgit(8)"))
    with pytest.raises(UserError, match=r"learns in order raster .*, not maskgit"):
        LlamaGen(TokenSpec.ids((12,), 13), ["a"], "maskgit(8)", dim=32, depth=1, num_heads=4)
    with pytest.raises(UserError, match="use decode_masked"):
        decode(tiny(), LABELS, Noise(0, range(3)))
    ordered = MaskGIT(TokenSpec.ids((12,), 13, ordered=True), ["a"], dim=32, depth=1, num_heads=4)
    with pytest.raises(UserError, match="all tokens at once"):
        Decoding(length=5).plan_of(ordered)


@torch.inference_mode()
@pytest.mark.parametrize("guidance", ["1", "linear(1,4)", "interval(3,0.3,0.6)"])
def test_decoding_follows_the_rule(guidance):
    """Against a plain re-enactment: the Gumbel-max rule, and sorted confidences."""
    model, steps, n = tiny(), 5, 12
    decoding = Decoding(
        Order(f"maskgit({steps},cosine)"),
        Schedule(guidance),
        Schedule("linear(1.3,0.5)"),
        randomness=Schedule("linear(2,0)"),
    )
    picks, doubts = torch.rand(3, steps, n, 13), torch.rand(3, steps, n)
    ids = torch.full((3, n), 13)
    for t in range(steps):
        r = (t + 1) / steps
        scale, tau = Schedule(guidance)(t / steps), 2 * (1 - r)
        cond, null = (
            model.head.logits(model.hidden(ids, labels))
            for labels in (LABELS, model.null_condition(LABELS))
        )
        logits = (null + scale * (cond - null)) / (1.3 - 0.8 * r)
        masked = ids == 13
        drawn = (logits + tau * gumbel(picks[:, t])).argmax(-1)
        ids = torch.where(masked, drawn, ids)
        if t + 1 < steps:
            sure = logits.gather(-1, drawn[..., None])[..., 0] + tau * gumbel(doubts[:, t])
            keep = max(1, min(int(masked[0].sum()) - 1, math.floor(n * math.cos(math.pi * r / 2))))
            for i in range(3):
                places = masked[i].nonzero()[:, 0]
                ids[i, places[sure[i, places].argsort()[:keep]]] = 13
    batches = []
    hidden = model.hidden
    model.hidden = lambda tokens, condition: (
        batches.append(len(tokens)),
        hidden(tokens, condition),
    )[1]
    assert torch.equal(decode_masked(model, LABELS, StoredNoise(picks, doubts), decoding), ids)
    plan = model.plan(decoding.plan)
    assert batches == [3 if scale == 1 else 6 for scale in decoding.scales(plan)]


@pytest.mark.parametrize("backbone", ["bert", "uvit"])
def test_an_image_depends_on_its_seed_and_index_alone(backbone):
    model = tiny((3, 5), backbone=backbone)
    labels, decoding = torch.arange(14) % 3, Decoding(guidance=Schedule("linear(1,3)"))

    def run(indices):
        return decode_masked(model, labels[indices], Noise(1, indices), decoding)

    together = run(torch.arange(14))
    for size in (1, 5):
        parts = [run(part) for part in torch.arange(14).split(size)]
        assert torch.equal(torch.cat(parts), together)
    order = torch.randperm(14)
    assert torch.equal(run(order), together[order])
    assert ((together >= 0) & (together < 13)).all()
    assert len(together.flatten(1).unique(dim=0)) > 10


def test_temperature_and_randomness_of_zero_are_greedy():
    model = tiny()
    runs = [
        decode_masked(model, LABELS, Noise(seed, range(3)), decoding)
        for seed in (0, 1)
        for decoding in (
            Decoding(temperature=Schedule(0)),
            Decoding(randomness=Schedule(0)),
        )
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)
    one = decode_masked(model, LABELS, Noise(0, range(3)), Decoding(Order("maskgit(1)")))
    with torch.inference_mode():
        logits = model.head.logits(model.hidden(torch.full((3, 12), 13), LABELS))
    assert torch.equal(one, logits.argmax(-1))


def test_ties_of_the_last_are_included():
    assert least(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), 2).tolist() == [[False, True, True, True]]


def test_gumbel_max_draws_the_distribution():
    logits = torch.randn(5)
    n = 40000
    tokens = sample_categorical(logits.expand(n, 5), torch.rand(n, 5), Sampling(2.0))
    expected = log_softmax(logits / 2, -1).exp()
    assert torch.allclose(torch.bincount(tokens, minlength=5) / n, expected, atol=0.01)
    assert gumbel(torch.tensor([0.0, 1.0])).isfinite().all()
