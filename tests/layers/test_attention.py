"""Attention by two ways: block mask and dense mask; rows written to slots and rows appended."""

import pytest
import torch

from vistok.decoding import Order
from vistok.layers.cache import KVCache
from vistok.layers.rotary import rotary_table, rotate
from vistok.layers.transformer import Attention


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("order", ["par(4)", "nar"])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_flex_attention_is_dense_attention(order, num_kv_heads):
    """What training takes on a GPU and what it takes on a CPU."""
    rows = Order(order)((6, 8)).training
    attention = Attention(64, 4, num_kv_heads, 0.0)
    x = torch.randn(2, rows.rows, 64)
    dense, flex = (attention(x, mask=mask) for mask in (rows.mask, rows.block_mask))
    assert torch.allclose(dense, flex, atol=1e-5)


@torch.no_grad()
def test_slots_in_order_are_appended_rows():
    attention = Attention(32, 4, 4, 0.0).eval()
    x = torch.randn(2, 6, 32)
    caches = [KVCache(1, 2, 4, 6, 8, x.dtype, x.device) for _ in range(2)]
    for start, rows in ((0, 1), (1, 3), (4, 2)):
        end = start + rows
        slots = torch.arange(start, end)
        appended = attention(x[:, start:end], cache=caches[0])
        written = attention(x[:, start:end], cache=caches[1], slots=slots, end=end)
        caches[0].advance(rows)
        assert torch.equal(appended, written)


def test_rotary_scores_depend_on_distances_alone():
    table = rotary_table((5, 7), 16)
    query, key = torch.randn(2, 1, 1, 1, 16).unbind(0)

    def score(a, b):
        at = [table[:, 7 * r + c].unsqueeze(1) for r, c in (a, b)]
        return (rotate(query, at[0]) * rotate(key, at[1])).sum()

    assert torch.allclose(score((0, 1), (2, 4)), score((2, 3), (4, 6)), atol=1e-5)
    assert not torch.allclose(score((0, 1), (2, 4)), score((0, 1), (4, 2)), atol=1e-3)


def test_channels_left_over_do_not_turn():
    table = rotary_table((2, 3, 4), 16)  # 8 pairs among 3 axes
    x = torch.randn(1, 1, 24, 16)
    assert torch.equal(rotate(x, table)[..., 12:], x[..., 12:])
    assert torch.allclose(rotate(x, table).norm(dim=-1), x.norm(dim=-1), atol=1e-5)
