import math

import pytest
import torch

from vistok.errors import IncompatibleTokensError, UserError
from vistok.tokens import TokenSpec, require_same

SPECS = [
    (TokenSpec.ids((8, 8), 4096), (8, 8), 64, 768),
    (TokenSpec.ids((32,), 1024, ordered=True), (32,), 32, 320),
    (TokenSpec.ids(((1, 1), (2, 2), (3, 3)), 16), (14,), 14, 56),
    (TokenSpec.factorised((4, 4), (8, 8, 4)), (4, 4, 3), 16, 128),
    (TokenSpec.latents((4, 4), 16), (4, 4, 16), 16, math.inf),
]


@pytest.mark.parametrize(("spec", "shape", "count", "bits"), SPECS)
def test_sizes_and_round_trip(spec, shape, count, bits):
    assert spec.tensor_shape == shape
    assert spec.num_tokens == count
    assert spec.bits == pytest.approx(bits)
    assert TokenSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(("spec", "shape", "count", "bits"), SPECS)
def test_check_accepts_its_own_tokens_only(spec, shape, count, bits):
    dtype = torch.float32 if spec.kind == "latents" else torch.int64
    spec.check(torch.zeros(2, *shape, dtype=dtype), "test")
    with pytest.raises(UserError, match="test"):
        spec.check(torch.zeros(2, *shape, 1, dtype=dtype), "test")
    other = torch.int64 if spec.kind == "latents" else torch.float32
    with pytest.raises(UserError, match="expected"):
        spec.check(torch.zeros(2, *shape, dtype=other), "test")


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "words", "shape": (4,)},
        {"kind": "ids", "shape": (4,)},
        {"kind": "ids", "shape": (4,), "vocab_size": 4, "dim": 2},
        {"kind": "latents", "shape": (4,), "vocab_size": 4},
    ],
)
def test_inconsistent_specs_are_refused(fields):
    with pytest.raises(UserError, match="TokenSpec"):
        TokenSpec(**fields)


def test_unfit_pair_names_both_sides():
    with pytest.raises(IncompatibleTokensError, match=r"A makes 8x8 ids of 16.* B .*4x4 ids of 16"):
        require_same("A", TokenSpec.ids((8, 8), 16), "B", TokenSpec.ids((4, 4), 16))
