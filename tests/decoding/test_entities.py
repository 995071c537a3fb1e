"""Orders of sets drawn jointly, and of random sets: what is decoded when, and by how many steps."""

import math
from itertools import pairwise

import pytest
import torch

from vistok.decoding import Corrected, Decoding, Given, Order, RandomPlan, Sampler, Schedule
from vistok.errors import UserError
from vistok.generators import MaskGIT
from vistok.tokens import TokenSpec

GRIDS = [(4, 4), (8, 12), (16, 16)]


def entities(spelling, shape):
    return [fed.predict.tolist() for fed in Order(spelling)(shape).passes]


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("spelling", ["cells(1)", "cells(2)", "cells(4)", "subsamples(2)"])
def test_entities_are_a_partition_and_see_those_before(spelling, shape):
    plan = Order(spelling)(shape)
    n = math.prod(shape)
    sets = entities(spelling, shape)
    assert sorted(position for one in sets for position in one) == list(range(n))
    assert [fed.tokens.tolist() for fed in plan.passes] == [[], *sets[:-1]]
    assert plan.fractions[0] == 0
    assert plan.fractions[-1] == (1 if len(sets) > 1 else 0)
    rank = plan.rank_of_position
    assert all((rank[one] == t).all() for t, one in enumerate(sets))


def test_cells_are_squares_and_subsamples_combs():
    assert entities("cells(2)", (4, 4))[:2] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert entities("subsamples(2)", (4, 4))[:2] == [[0, 2, 8, 10], [1, 3, 9, 11]]
    assert entities("cells(1)", (2, 2)) == [[0], [1], [2], [3]]
    assert entities("cells(4)", (4, 4)) == [list(range(16))]
    assert len(entities("cells(8)", (16, 16))) == 4


def test_scales_lie_one_after_another():
    plan = Order("scales(1,2,4)")((4, 4))
    assert plan.shape == ((1, 1), (2, 2), (4, 4))
    assert [len(fed.predict) for fed in plan.passes] == [1, 4, 16]
    assert torch.equal(torch.cat([fed.predict for fed in plan.passes]), torch.arange(21))
    assert plan.fractions == [0, 0.5, 1]


@pytest.mark.parametrize("spelling", ["cells(3)", "subsamples(3)", "cells(0)", "cells(a)"])
def test_sets_that_do_not_fit_are_refused(spelling):
    with pytest.raises(UserError, match="order"):
        Order(spelling)((4, 8))


@pytest.mark.parametrize("spelling", ["scales(1,2)", "scales(4,2)", "scales(0,4)", "scales"])
def test_scales_that_do_not_fit_are_refused(spelling):
    with pytest.raises(UserError, match="scales"):
        Order(spelling)((4, 4))
    with pytest.raises(UserError, match="scales"):
        Order("scales(1,4)")((4, 8))


@pytest.mark.parametrize(
    ("tokens", "steps", "published"),
    [
        (256, 16, [2, 3, 7, 8, 11, 13, 15, 16, 19, 20, 22, 23, 23, 25, 24, 25]),
        (256, 256, [1] * 256),
        (9, 40, [1] * 9),
        (5, 1, [5]),
    ],
)
def test_tokens_of_each_pass_of_mar(tokens, steps, published):
    plan = Order(f"mar({steps})")((tokens,))
    assert isinstance(plan, RandomPlan)
    left = (*plan.masked, 0)
    assert [before - after for before, after in pairwise(left)] == published


def test_guidance_of_mar_counts_what_is_known_after_the_pass():
    """1 + (w - 1)(L - m)/L with the m of the next mask, which is 1 in the last pass (MAR)."""
    plan = Order("mar(4)")((16,))
    scales = Decoding(guidance=Schedule("linear(1,3)")).scales(plan)
    assert scales == pytest.approx([1 + 2 * (16 - m) / 16 for m in (*plan.masked[1:], 1)])


def test_steps_are_annealed_from_the_first_pass_to_the_last():
    plan = Order("cells(2)")((4, 4))
    own = Schedule(50)
    assert Decoding().budgets(plan, own) == [50] * 4
    # Published for the 4 cells of xAR (DiSA, arXiv:2505.20297).
    assert Decoding(steps=Schedule("linear(50,15)")).budgets(plan, own) == [50, 38, 26, 15]
    assert Decoding(steps=Schedule("two_stage(50,5)")).budgets(plan, own) == [50, 50, 5, 5]
    assert Decoding(sampler=Sampler("sections(3,3,0)")).budgets(plan, own) == [6] * 4
    assert Decoding(steps=Schedule("linear(9,2)")).budgets(Order("mar(1)")((4,)), own) == [9]


@pytest.mark.parametrize("spelling", ["ddpm", "ddpm(950)", "sections(3,0,2)", "flowar(0.9)"])
def test_samplers_read_back(spelling):
    sampler = Sampler(spelling)
    assert str(sampler) == spelling
    assert Sampler(str(sampler)) == sampler
    settings = Decoding(sampler=sampler, steps=Schedule("linear(50,5)"))
    assert Decoding.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize("spelling", ["dppm", "ddpm(1,2)", "ddpm(a)", "sections", "euler(3)"])
def test_wrong_samplers_are_refused(spelling):
    with pytest.raises(UserError, match="sampler"):
        Sampler(spelling)


def test_settings_of_older_checkpoints_are_read():
    older = {"guidance": "constant(2)", "budget": "constant(1)", "top_k": 0}
    assert Decoding.from_dict(older) == Decoding(guidance=Schedule(2), steps=Schedule(1))


def test_a_head_without_steps_refuses_a_sampler():
    model = MaskGIT(TokenSpec.ids((4,), 5), ["a"], dim=8, depth=1, num_heads=2)
    with pytest.raises(UserError, match="CategoricalHead has no sampler 'ddpm'"):
        Decoding(sampler=Sampler("ddpm")).plan_of(model)


def test_scales_are_predicted_again_from_their_own_tokens():
    shape = ((1, 1), (2, 3), (4, 4))
    plan, corrected = Order("next_scale")(shape), Order("next_scale(2)")(shape)
    assert [len(fed.predict) for fed in plan.passes] == [1, 6, 16]
    assert plan.fractions == [0, 0.5, 1]
    assert [fed.correction for fed in corrected.passes] == [0, 0, 1, 2, 0, 1, 2]
    assert corrected.fractions == [0, 0.5, 0.5, 0.5, 1, 1, 1]
    for fed in corrected.passes:
        if fed.correction:
            assert torch.equal(fed.tokens, fed.predict)
    # What is learned, and where decoding may stop, do not depend on corrections.
    assert torch.equal(corrected.rank_of_position, plan.rank_of_position)
    assert corrected.joint.rank == plan.joint.rank
    assert len(corrected.first(7)) == 4 and len(plan.first(7)) == 2
    with pytest.raises(UserError, match="needs tokens of scales, not 4x4"):
        Order("next_scale")((4, 4))


def test_filters_of_corrections():
    decoding = Decoding(top_k=Corrected("linear(100,10)/5/1"), top_p=Corrected("0.8/1"))
    found = [decoding.sampling(0.5, correction) for correction in range(4)]
    assert [(s.top_k, s.top_p) for s in found] == [(55, 0.8), (5, 1), (1, 1), (1, 1)]
    assert Decoding.from_dict(decoding.to_dict()) == decoding
    with pytest.raises(UserError, match="top_p"):
        Decoding(top_p=Corrected("0.8/0"))


def test_given_tokens_take_the_place_of_what_is_decoded():
    given = Given(
        torch.arange(12).view(2, 6), torch.tensor([True, False, True, False, True, False])
    )
    sampled, positions = torch.full((2, 3), -1), torch.tensor([2, 3, 5])
    assert given.over(sampled, positions).tolist() == [[2, -1, -1], [8, -1, -1]]
    vectors = Given(torch.ones(1, 2, 3), torch.tensor([[True, False]]))
    assert vectors.over(torch.zeros(1, 2, 3), torch.arange(2)).tolist() == [[[1.0] * 3, [0.0] * 3]]
