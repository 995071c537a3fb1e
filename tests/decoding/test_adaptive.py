"""ZipAR's adaptive window against raster order, its bound on passes, and the rule it tests by."""

from itertools import pairwise

import pytest
import torch

from vistok.decoding import Decoding, Noise, Schedule, decode, decode_adaptively
from vistok.decoding.adaptive import retest
from vistok.decoding.sampling import inverse_cdf
from vistok.generators import LlamaGen
from vistok.tokens import TokenSpec

LABELS = torch.tensor([0, 1, 2])


def tiny(shape=(5, 6)):
    model = LlamaGen(TokenSpec.ids(shape, 7), ["a", "b", "c"], dim=32, depth=2, num_heads=4).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("guidance", [1, 2])
def test_a_window_of_the_width_is_raster_order(guidance):
    model, decoding = tiny(), Decoding(guidance=Schedule(guidance))
    expected = decode(model, LABELS, Noise(0, range(3)), decoding)
    for window in (6, 9):
        tokens, passes = decode_adaptively(model, LABELS, Noise(0, range(3)), window, decoding)
        assert torch.equal(tokens, expected)
        assert passes == [30] * 3


def test_equal_distributions_take_the_fewest_passes():
    """What does not change is accepted at the first test: 2w + (h - 2)(s + 1)."""
    model = tiny()
    torch.nn.init.zeros_(model.head.linear.weight)
    for window in (1, 2, 3, 4):
        _, passes = decode_adaptively(model, LABELS, Noise(0, range(3)), window, Decoding())
        assert passes == [12 + 3 * (window + 1)] * 3


def test_images_depend_on_their_own_number_alone():
    model = tiny()
    together, passes = decode_adaptively(model, LABELS, Noise(4, [0, 1, 2]), 2, Decoding())
    alone, one = decode_adaptively(model, LABELS[1:2], Noise(4, [1]), 2, Decoding())
    assert torch.equal(together[1], alone[0])
    assert passes[1] == one[0]
    assert all(12 + 3 * 3 <= count <= 30 for count in passes)
    assert ((together >= 0) & (together < 7)).all()


def test_passes_are_seen_as_they_end():
    seen = []
    tokens, passes = decode_adaptively(
        tiny(), LABELS, Noise(4, range(3)), 2, Decoding(), lambda t, x: seen.append((t, x.clone()))
    )
    assert [t for t, _ in seen] == list(range(sum(passes)))
    for (_, before), (_, after) in pairwise(seen):
        known = before >= 0
        assert known.sum() <= (after >= 0).sum()
        assert torch.equal(before[known], after[known])
    assert torch.equal(seen[-1][1].view_as(tokens), tokens)


def test_greedy_decoding_is_defined():
    decoding = Decoding(temperature=Schedule(0), guidance=Schedule(2))
    runs = [decode_adaptively(tiny_model, LABELS, Noise(s, range(3)), 2, decoding)[0]
            for tiny_model in [tiny()] for s in (0, 1)]  # fmt: skip
    assert torch.equal(*runs)


def test_retesting_turns_draws_of_one_distribution_into_draws_of_another():
    before, now = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.4, 0.3, 0.2])
    n = 4000
    uniforms = torch.rand(n, 3, dtype=torch.float64)
    counts, kept = torch.zeros(4), 0
    for first, accepts, draw in uniforms:
        token, accepted = retest(inverse_cdf(before, first), before, now, accepts, draw)
        counts[token] += 1
        kept += accepted
    assert torch.allclose(counts / n, now, atol=0.03)
    assert kept / n == pytest.approx(torch.minimum(before, now).sum().item(), abs=0.03)


def test_a_difference_by_rounding_alone_keeps_the_candidate():
    before = torch.tensor([0.5, 0.5, 0.0])
    now = torch.tensor([0.4999999, 0.5, 0.0])  # less than before in one place, more in none
    accepts, draw = torch.tensor(1 - 1e-12, dtype=torch.float64), torch.tensor(0.7)
    token, accepted = retest(torch.tensor(0), before, now, accepts, draw)
    assert (token, accepted) == (0, True)
