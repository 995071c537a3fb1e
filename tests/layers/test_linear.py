import pytest
import torch

from vistok.layers.linear import Linear


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
