import pytest
import torch

from vistok.decoding import raster

SHAPES = [(1,), (7,), (3, 5), (8, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition_rows", [1, 4])
def test_each_position_is_predicted_once_after_what_it_needs(shape, condition_rows):
    plan = raster(shape, condition_rows)
    n = len(torch.zeros(shape).flatten())
    assert len(plan) == n
    assert plan.rows == condition_rows + n - 1
    known = set()
    for fed, fraction in zip(plan.passes, plan.fractions, strict=True):
        assert fraction == len(known) / n
        assert set(fed.tokens.tolist()) <= known
        assert fed.source.max() < fed.rows
        known |= set(fed.predict.tolist())
    assert torch.cat([fed.predict for fed in plan.passes]).tolist() == list(range(n))


@pytest.mark.parametrize("shape", SHAPES)
def test_training_rows_are_all_passes_under_the_triangular_mask(shape):
    plan = raster(shape)
    rows = plan.training
    assert rows.rows == plan.rows
    assert rows.is_causal
    n = rows.rows
    expected = torch.ones(n, n).tril().bool()
    assert (rows.mask is None and n == 1) or torch.equal(rows.mask, expected)
    assert rows.source.flatten().tolist() == list(range(n))


def test_gather_weighs_rows():
    fed = raster((3,)).training
    hidden = torch.randn(2, 3, 4)
    assert torch.equal(fed.gather(hidden), hidden)
