import pytest
import torch

from vistok.layers.linear import Linear, by_columns, laid_out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(1,), (3,), (4,), (2, 8), (64,), (65,), (2, 3, 5)])
def test_both_products_are_the_same_map(batch, bias):
    linear, x = Linear(12, 20, bias), torch.randn(*batch, 12)
    expected = linear(x)  # with gradients: as `nn.Linear` computes it
    assert expected.requires_grad
    with torch.inference_mode():
        out = linear(x)
    assert out.is_contiguous()
    assert torch.allclose(out, expected, atol=1e-6)


def test_autocast_and_transposed_inputs():
    linear, x = Linear(12, 20), torch.randn(5, 2, 12).transpose(0, 1)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.allclose(linear(x), x @ linear.weight.t(), atol=1e-6)


def test_another_layout_is_lent():
    """Within, a map reads what it was lent; then its own again, even after an error."""
    linear, x = Linear(12, 20, bias=True), torch.randn(5, 12)
    with torch.inference_mode():
        weights = by_columns([linear])
        assert weights[linear].stride() == (1, 20)
        assert torch.equal(weights[linear], linear.weight)
        expected = linear(x)
        with laid_out(weights):
            assert torch.allclose(linear(x), expected, atol=1e-6)
        doubled = {linear: 2 * weights[linear]}
        with pytest.raises(RuntimeError, match="stop"), laid_out(doubled):
            assert torch.allclose(linear(x), 2 * expected - linear.bias, atol=1e-6)
            raise RuntimeError("stop")
        assert torch.equal(linear(x), expected)
    with laid_out(doubled):  # not in training
        assert torch.allclose(linear(x), expected, atol=1e-6)
