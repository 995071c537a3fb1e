"""Every order over many shapes: what makes a plan one, and the passes by its formula."""

import math

import pytest
import torch

from vistok.decoding import Order
from vistok.errors import UserError

GRIDS = [(1, 1), (1, 5), (5, 1), (2, 2), (3, 5), (5, 3), (4, 4), (6, 9), (8, 8), (16, 16), (12, 24)]
SEQUENCES, VIDEOS = [(1,), (7,)], [(1, 2, 3), (2, 3, 4), (4, 16, 16)]


def divides(side):
    return [(h, w) for h, w in GRIDS if h % side == 0 and w % side == 0]


# (order, shape, forward passes by the closed form)
CASES = [
    *(("raster", s, math.prod(s)) for s in GRIDS + SEQUENCES + VIDEOS),
    *(("random(3)", s, math.prod(s)) for s in GRIDS + SEQUENCES + VIDEOS),
    *((order, s, math.prod(s)) for order in ("diagonal", "diagonal(flip)") for s in GRIDS),
    *(("nar", s, sum(s) - len(s) + 1) for s in GRIDS + SEQUENCES + VIDEOS),
    *(
        (f"par({a * a})", (*t, h, w), a * a + math.prod((*t, h, w)) // (a * a) - 1)
        for a in (1, 2, 3, 4)
        for h, w in divides(a)
        for t in ((), (3,))
    ),
    *(
        (f"zipar({s}{rule})", (h, w), 2 * w + (h - 2) * s if 0 < s < w and h > 1 else h * w)
        for h, w in GRIDS
        for s in (-1, 0, 1, 2, 3, 4, w - 1, w, w + 5)
        for rule in ("", ",masked")
    ),
]


@pytest.mark.parametrize("condition_rows", [1, 4])
@pytest.mark.parametrize(("spelling", "shape", "passes"), CASES, ids=str)
def test_plan(spelling, shape, passes, condition_rows):
    plan = Order(spelling)(shape, condition_rows)
    n = math.prod(shape)
    assert len(plan) == passes
    known, rank = set(), -1
    for fed, fraction in zip(plan.passes, plan.fractions, strict=True):
        assert fraction == len(known) / n
        assert set(fed.tokens.tolist()) <= known  # nothing is fed before it is predicted
        assert fed.rows == len(fed.condition) + len(fed.tokens) + len(fed.placeholders)
        assert fed.source.max() < fed.rows
        assert torch.allclose(fed.weight.sum(1), torch.ones(len(fed.predict)))
        assert min(fed.rank) > rank
        rank = max(fed.rank)
        assert known.isdisjoint(fed.predict.tolist())
        known |= set(fed.predict.tolist())
    assert known == set(range(n))
    assert plan.length <= condition_rows + n - 1 + plan.num_placeholders or n == 1


@pytest.mark.parametrize(
    ("spelling", "shape", "passes"),
    [
        ("raster", (16, 16), 256),
        ("par(4)", (16, 16), 67),
        ("par(16)", (24, 24), 51),
        ("nar", (16, 16), 31),
        ("nar", (4, 16, 16), 34),
        ("zipar(16)", (24, 24), 400),
        ("zipar(4)", (16, 16), 88),
    ],
)
def test_published_pass_counts(spelling, shape, passes):
    assert len(Order(spelling)(shape)) == passes


@pytest.mark.parametrize("case", [c for c in CASES if "zipar" not in c[0]], ids=str)
def test_training_is_all_passes_under_the_rule_of_ranks(case):
    plan = Order(case[0])(case[1], 2)
    rows = plan.training
    assert rows.rows == plan.rows
    assert sorted(rows.predict.tolist()) == list(range(math.prod(case[1])))
    rank = torch.tensor(rows.rank)
    visible = rank[None, :] <= rank[:, None]
    assert rows.mask is None or torch.equal(rows.mask, visible)
    if rows.is_causal:
        assert torch.equal(visible, torch.ones(rows.rows, rows.rows).tril().bool())
    # Row by row the same embedding, place and prediction as in the pass that feeds it.
    start = {"condition": 0, "tokens": 0, "placeholders": 0}
    position = 0
    for fed in plan.passes:
        assert rows.predict[position : position + len(fed.predict)].tolist() == fed.predict.tolist()
        position += len(fed.predict)
        for kind in start:
            given = getattr(fed, kind)
            end = start[kind] + len(given)
            assert getattr(rows, kind)[start[kind] : end].tolist() == given.tolist()
            start[kind] = end


def test_mixing_holds_the_triples():
    for fed in Order("nar")((3, 4)).passes:
        hidden = torch.randn(2, 5, fed.rows, 6)  # heads, batch, rows, channels
        mixed = torch.einsum("hsr,hbrd->bshd", fed.mixing, hidden)
        for s in range(len(fed.predict)):
            expected = torch.zeros(5, 2, 6)
            triples = zip(fed.source[s], fed.head[s], fed.weight[s], strict=True)
            for row, head, weight in triples:
                expected[:, head] += weight * hidden[head, :, row]
            assert torch.allclose(mixed[:, s], expected)


def test_the_diagonal_path_never_jumps():
    """Two kinds of straight steps and two of diagonal ones, in known numbers."""
    for height, width in GRIDS:
        for spelling in ("diagonal", "diagonal(flip)"):
            passes = Order(spelling)((height, width)).passes
            path = torch.cat([fed.predict for fed in passes])
            cells = torch.stack([path // width, path % width], dim=1)
            steps = [tuple(step) for step in (cells[1:] - cells[:-1]).tolist()]
            assert set(steps) <= {(0, 1), (1, 0), (1, -1), (-1, 1)}
            straight = sum(step in ((0, 1), (1, 0)) for step in steps)
            assert straight == height + width - 2
    first = [fed.predict.item() for fed in Order("diagonal")((3, 3)).passes]
    assert first == [0, 1, 3, 6, 4, 2, 5, 7, 8]


def test_parallel_sets_are_where_the_papers_put_them():
    nar = Order("nar")((3, 4)).passes
    assert [len(fed.predict) for fed in nar] == [1, 2, 3, 3, 2, 1]
    assert nar[2].predict.tolist() == [2, 5, 8]  # ascending row
    par = Order("par(4)")((4, 4)).passes  # worked example of the paper's scheme
    order = torch.cat([fed.predict for fed in par]).tolist()
    assert order == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]
    assert [len(fed.placeholders) for fed in par] == [0, 0, 0, 0, 3, 0, 0]


def test_a_slot_holds_its_row_when_a_zipped_row_may_see_it():
    plan = Order("zipar(2,masked)")((4, 5), 3)
    written = set()
    for fed in plan.passes:
        if fed.slots is None:
            written |= set(range(len(written), len(written) + fed.rows))
            continue
        written |= set(fed.slots.tolist())
        for slot, sees in zip(fed.slots.tolist(), fed.sees, strict=True):
            visible = sees.nonzero().flatten().tolist()
            assert visible == sorted(w for w in written if w <= slot)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("zigzag", "none of raster"),
        ("zippar(4)", "did you mean 'zipar'"),
        ("par(4,4)", "takes regions"),
        ("par(many)", "whole number"),
        ("zipar(4", "form"),
        ("raster(2)", "takes nothing"),
    ],
)
def test_wrong_spellings_are_refused(spelling, message):
    with pytest.raises(UserError, match=message):
        Order(spelling)


@pytest.mark.parametrize(
    ("spelling", "shape"),
    [
        ("par(3)", (6, 6)),
        ("par(4)", (3, 4)),
        ("par(4)", (16,)),
        ("zipar(2)", (9,)),
        ("zipar(2,hidden)", (4, 4)),
        ("diagonal", (2, 3, 4)),
        ("diagonal(up)", (3, 4)),
    ],
)
def test_unfit_shapes_are_refused(spelling, shape):
    with pytest.raises(UserError, match=spelling.split("(")[0]):
        Order(spelling)(shape)


def test_spelling_round_trip():
    for spelling in ("raster", "par(4)", "zipar(8,masked)", "random(3)", "diagonal(flip)"):
        order = Order(spelling)
        assert str(order) == spelling
        assert Order(str(order)) == order
        assert hash(Order(order)) == hash(order)
    assert Order("par( 9 )") == Order("par(9)")
