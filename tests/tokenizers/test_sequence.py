"""Tail drop: the laws of the lengths, and that what is dropped is not seen."""

import pytest
import torch

from vistok.errors import UserError
from vistok.quantizers import FSQ
from vistok.tokenizers import TiTok
from vistok.tokenizers.sequence import TailDrop

DRAWS = 4000


def lengths(spelling: str, num_tokens: int) -> torch.Tensor:
    tail_drop = TailDrop(spelling, num_tokens)
    assert tail_drop.per_sample
    return tail_drop.draw(DRAWS, torch.device("cpu"))


def frequencies(spelling: str, num_tokens: int) -> dict[int, float]:
    values, counts = lengths(spelling, num_tokens).unique(return_counts=True)
    return {int(v): int(c) / DRAWS for v, c in zip(values, counts, strict=True)}


@pytest.mark.parametrize("first, last, spelling", [(1, 12, "uniform"), (3, 7, "uniform(3,7")])
def test_uniform_lengths(first, last, spelling):
    spelling = f"{spelling},sample)" if "(" in spelling else f"{spelling}(sample)"
    found = frequencies(spelling, 12)
    assert list(found) == list(range(first, last + 1))
    expected = 1 / (last - first + 1)
    assert all(abs(share - expected) < 0.03 for share in found.values())


@pytest.mark.parametrize("n, powers", [(16, [1, 2, 4, 8, 16]), (12, [1, 2, 4, 8, 12]), (1, [1])])
def test_powers_of_two_are_equally_likely(n, powers):
    found = frequencies("pow2(sample)", n)
    assert list(found) == powers
    assert all(abs(share - 1 / len(powers)) < 0.03 for share in found.values())


def test_rounding_up_favours_long_sequences():
    found = frequencies("uniform_pow2(sample)", 16)
    expected = {1: 1 / 16, 2: 1 / 16, 4: 2 / 16, 8: 4 / 16, 16: 8 / 16}
    assert found.keys() == expected.keys()
    assert all(abs(found[k] - expected[k]) < 0.03 for k in expected)
    assert max(frequencies("uniform_pow2(sample)", 12)) == 12


def test_one_length_serves_a_batch():
    found = {TailDrop("uniform(2,5)", 9).draw(4, torch.device("cpu")) for _ in range(100)}
    assert found == {2, 3, 4, 5}


@pytest.mark.parametrize(
    "spelling",
    ["unifrom", "uniform(0,4)", "uniform(5,3)", "uniform(1,13)", "pow2(4)", "uniform(a,b)"],
)
def test_other_spellings_are_refused(spelling):
    with pytest.raises(UserError, match="tail drop"):
        TailDrop(spelling, 12)


def small(tail_drop: str | None) -> TiTok:
    return TiTok(
        FSQ([8, 5, 4]), 16, 4, num_latent_tokens=6, tail_drop=tail_drop, encoder_width=24,
        encoder_depth=1, encoder_heads=2, decoder_width=24, decoder_depth=2, decoder_heads=2,
    )  # fmt: skip


@torch.no_grad()
def test_dropped_tokens_are_not_seen():
    model, images = small("uniform").eval(), torch.rand(3, 3, 16, 16)
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that tokens tell
    tokens, kept = model.encode(images), torch.tensor([1, 4, 6])
    other = torch.where(torch.arange(6) < kept[:, None], tokens, (tokens + 1) % 160)
    together = model.decode(tokens, lengths=kept)
    assert torch.equal(model.decode(other, lengths=kept), together)
    for i, length in enumerate(kept):
        alone = model.decode(tokens[i : i + 1, :length])
        torch.testing.assert_close(alone[0], together[i])
    assert not torch.allclose(model.decode(other), model.decode(tokens), atol=1e-2)


def test_training_drops_and_evaluation_does_not():
    model, images = small("uniform(1,2)"), torch.rand(2, 3, 16, 16)
    for tail_drop in ("uniform(1,2)", "uniform(1,2,sample)"):
        model.tail_drop = TailDrop(tail_drop, 6)
        seen = {round(6 * float(share)) for _ in range(20) for share in model.train()(images).kept}
        assert seen == {1, 2}
    assert model.eval()(images).kept is None
    assert small(None).train()(images).kept is None


def test_what_was_trained_whole_decodes_whole(tmp_path):
    model = small(None).eval()
    tokens = model.encode(torch.rand(2, 3, 16, 16))
    with pytest.raises(UserError, match="expected 6 ids"):
        model.decode(tokens[:, :3])
    with pytest.raises(UserError, match="decode as a whole"):
        model.decode(tokens, lengths=torch.tensor([2, 3]))
    ordered = small("uniform").eval()
    for wrong in ([0, 3], [3, 7], [3]):
        with pytest.raises(UserError, match="from 1 to 6 for each of 2 images"):
            ordered.decode(tokens, lengths=torch.tensor(wrong))
    # A config overrides the other: the weights are the same.
    model.save_pretrained(tmp_path)
    forced = TiTok.from_pretrained(tmp_path, tail_drop="uniform")
    assert forced.spec.has_prefixes
    assert torch.equal(forced.decode(tokens), model.decode(tokens))
