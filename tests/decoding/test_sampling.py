import pytest
import torch

from vistok.decoding import Noise, Sampling, StoredNoise, probabilities, sample_categorical
from vistok.errors import UserError


def test_inverse_cdf_draws_the_distribution():
    logits = torch.randn(7)
    uniform = torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1]
    tokens = sample_categorical(logits.expand(20000, 7), uniform, Sampling())
    frequency = torch.bincount(tokens, minlength=7) / 20000
    assert torch.allclose(frequency, logits.softmax(-1), atol=1e-4)


def test_top_k_and_top_p_keep_the_most_likely():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    full = logits.softmax(-1)
    top2 = probabilities(logits, Sampling(top_k=2))
    assert (top2 > 0).tolist() == [[False, True, False, True]]
    assert torch.allclose(top2[0, [1, 3]], full[0, [1, 3]] / full[0, [1, 3]].sum())
    # 0.64 alone does not reach 0.7: the token that crosses is kept.
    assert (probabilities(logits, Sampling(top_p=0.7)) > 0).tolist() == [[False, True, False, True]]
    assert (probabilities(logits, Sampling(top_p=1e-6)) > 0).sum() == 1


def test_a_filtered_token_is_never_drawn_at_either_end():
    logits = torch.randn(64, 50)
    kept = probabilities(logits, Sampling(top_k=3)) > 0
    for u in (0.0, 1 - 2**-53):
        tokens = sample_categorical(logits, torch.full((64,), u).double(), Sampling(top_k=3))
        assert kept.gather(1, tokens[:, None]).all()


def test_temperature_zero_is_the_most_likely_token():
    logits = torch.randn(5, 9)
    tokens = sample_categorical(logits, torch.rand(5), Sampling(temperature=0.0))
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError):
        Sampling(**wrong)


def test_streams_depend_on_seed_and_index_alone():
    together = Noise(3, range(6))
    u, n = together.uniform(4), together.normal(2, 2)
    for i in (5, 0, 3):
        alone = Noise(3, [i])
        assert torch.equal(alone.uniform(4)[0], u[i])
        assert torch.equal(alone.normal(2, 2)[0], n[i])
    assert not torch.equal(Noise(4, [0]).uniform(4)[0], u[0])
    assert len(u.unique()) == u.numel()


def test_stored_noise_is_replayed_and_its_shape_checked():
    stored = StoredNoise(torch.rand(2, 3), torch.randn(2, 4))
    assert stored.uniform(3).shape == (2, 3)
    with pytest.raises(ValueError, match="stored noise"):
        stored.normal(5)
