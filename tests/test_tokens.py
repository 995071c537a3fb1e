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
    (TokenSpec.factorised((2, 3), (64,) * 4, values="normal(5,3)"), (2, 3, 4), 6, 144),
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
        {"kind": "latents", "shape": (4,), "dim": 4, "values": "normal(5,3)"},
    ],
)
def test_inconsistent_specs_are_refused(fields):
    with pytest.raises(UserError, match="TokenSpec"):
        TokenSpec(**fields)


def test_unfit_pair_names_both_sides():
    with pytest.raises(IncompatibleTokensError, match=r"A makes 8x8 ids of 16.* B .*4x4 ids of 16"):
        require_same("A", TokenSpec.ids((8, 8), 16), "B", TokenSpec.ids((4, 4), 16))


def test_digits_that_stand_for_other_values_do_not_fit():
    made, wanted = (
        TokenSpec.factorised((4, 4), (8, 8), values=values) for values in ("normal(5,3)", None)
    )
    with pytest.raises(IncompatibleTokensError, match=r"of values normal\(5,3\), but"):
        require_same("A", made, "B", wanted)


def test_any_first_tokens_of_an_ordered_sequence_are_tokens():
    ordered = TokenSpec.ids((8,), 16, ordered=True)
    for length in range(1, 9):
        ordered.check(torch.zeros(2, length, dtype=torch.int64), "test")
        assert ordered.first(length).tensor_shape == (length,)
        assert ordered.first(length).bits == 4 * length
    for length in (0, 9):
        with pytest.raises(UserError, match="decodes from 1 to 8 tokens"):
            ordered.first(length)
        with pytest.raises(UserError, match="expected 8 ordered ids"):
            ordered.check(torch.zeros(2, length, dtype=torch.int64), "test")
    assert ordered.first(8) == ordered


@pytest.mark.parametrize("spec", [TokenSpec.ids((8,), 16), TokenSpec.ids((4, 2), 16, ordered=True)])
def test_other_tokens_decode_as_a_whole(spec):
    assert spec.first(8) == spec
    with pytest.raises(UserError, match="decodes from all 8 tokens"):
        spec.first(4)
    with pytest.raises(UserError, match="expected"):
        spec.check(torch.zeros(2, spec.shape[0] // 2, *spec.shape[1:], dtype=torch.int64), "test")


def test_whole_sequences_fit_a_tokenizer_of_any_length():
    whole, ordered = TokenSpec.ids((8,), 16), TokenSpec.ids((8,), 16, ordered=True)
    require_same("A", ordered, "B", whole)
    require_same("A", ordered, "B", ordered)
    with pytest.raises(IncompatibleTokensError, match="A makes 8 ids of 16"):
        require_same("A", whole, "B", ordered)


def test_first_scales_decode():
    spec = TokenSpec.ids(((1, 1), (2, 3), (4, 4)), 9, ordered=True)
    assert list(spec.lengths) == [1, 7, 23] and spec.has_prefixes
    assert spec.first(7).shape == ((1, 1), (2, 3)) and spec.first(23) == spec
    spec.check(torch.zeros(2, 7, dtype=torch.long), "here")
    with pytest.raises(UserError, match="decodes from 1, 7, 23 tokens"):
        spec.first(8)
    with pytest.raises(UserError, match="expected 1x1"):
        spec.check(torch.zeros(2, 8, dtype=torch.long), "here")
    assert TokenSpec.ids(((1, 1), (2, 2)), 9).lengths == (5,)
