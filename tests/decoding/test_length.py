"""Decoding stops after the first tokens where any of them decode."""

import pytest
import torch

from vistok import LlamaGen, TokenSpec
from vistok.decoding import Decoding, Noise, Order, Schedule, decode
from vistok.errors import UserError

SEQUENCE = TokenSpec.ids((9,), 11, ordered=True)


def model(spec: TokenSpec, **options) -> LlamaGen:
    made = LlamaGen(spec, ["a", "b"], dim=24, depth=2, num_heads=2, **options).eval()
    torch.nn.init.normal_(made.head.linear.weight)
    return made


@pytest.mark.parametrize("length", [1, 4, 9])
def test_the_first_tokens_are_those_of_the_whole(length):
    generator, labels = model(SEQUENCE), torch.tensor([0, 1, 1])
    guided = Decoding(guidance=Schedule(3))
    whole = decode(generator, labels, Noise(0, range(3)), guided)
    short = decode(generator, labels, Noise(0, range(3)), guided.changed(length=length))
    # Each token has its own number, whatever comes after it.
    assert torch.equal(short, whole[:, :length])
    assert len(guided.changed(length=length).plan_of(generator)) == length


def test_progress_is_that_of_the_length():
    plan = Decoding(length=4).plan_of(model(SEQUENCE))
    assert plan.fractions == [0, 0.25, 0.5, 0.75]


def test_a_length_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="decodes from 1 to 9 tokens"):
        Decoding(length=10).plan_of(model(SEQUENCE))
    with pytest.raises(UserError, match="decodes from all 9 tokens"):
        Decoding(length=4).plan_of(model(TokenSpec.ids((3, 3), 11)))
    shuffled = model(SEQUENCE, order="random(3)")
    with pytest.raises(UserError, match="does not decode the first 4 tokens first"):
        Decoding(length=4).plan_of(shuffled)
    assert len(Decoding(length=9).plan_of(shuffled)) == 9


def test_settings_are_kept_and_old_ones_read():
    chosen = Decoding(Order("raster"), length=4, randomness=Schedule("linear(9.5,0)"))
    assert Decoding.from_dict(chosen.to_dict()) == chosen
    old = {k: v for k, v in chosen.to_dict().items() if k not in ("length", "randomness")}
    assert Decoding.from_dict(old) == Decoding(Order("raster"))
