import itertools

import pytest
import torch
import torch.nn.functional as F

from vistok.decoding import Noise
from vistok.decoding.sampling import Sampling, sample_categorical
from vistok.errors import IncompatibleTokensError, UserError
from vistok.heads import DimensionWiseHead, dimension_wise
from vistok.quantizers import DimensionWise
from vistok.tokens import TokenSpec

SIZES = {"width": 32, "depth": 2, "num_heads": 4}
PUBLISHED = TokenSpec.factorised((4, 4), (8,) * 16, values="normal(5,3)")
VARIANTS = [
    (PUBLISHED, {}),
    (TokenSpec.factorised((6,), (5, 5, 5), values="normal(2,2)"), {"order": [2, 0, 1]}),
    (TokenSpec.latents((2, 3), 4), {"hidden_ratio": 1.5, "norm_eps": 1e-3}),
    (TokenSpec.latents((2, 3), 2), {"quantizer": DimensionWise(2, 3), "depth": 1}),
    (TokenSpec.latents((2, 3), 1), {}),
]


def tiny(spec, hidden_dim=24, **more):
    """A head with random weights everywhere, so that no modulation is trivial."""
    head = DimensionWiseHead(**{**SIZES, **more}).fitted(hidden_dim, spec).eval()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return head


@pytest.fixture(params=VARIANTS, ids=lambda v: f"{v[0]}-{','.join(v[1])}")
def head(request):
    spec, arguments = request.param
    return tiny(spec, **arguments)


def hidden_and_noise(head, batch=2, tokens=5):
    hidden = torch.randn(batch, tokens, head.condition.in_features)
    return hidden, head.draw_noise(Noise(3, range(batch)), tokens)


def in_order(head, values):
    """The digits of values in the order in which they are drawn."""
    return head.quantizer.quantise(values).flatten(0, 1)[:, list(head.order)]


@torch.inference_mode()
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=3), Sampling(0.0)])
def test_drawn_digits_and_their_logits_are_those_of_a_forward_pass_over_all(head, sampling):
    hidden, noise = hidden_and_noise(head)
    seen = []
    head.digit_logits.register_forward_hook(lambda *call: seen.append(call[2]))
    values = head.sample(hidden, None, 1.0, noise, sampling)
    digits = in_order(head, values)
    logits = head.logits(hidden.flatten(0, 1), digits)
    torch.testing.assert_close(torch.cat(seen[:-1], dim=1), logits, atol=1e-5, rtol=1e-5)
    uniform = noise.flatten(0, 1)[:, list(head.order)]
    assert torch.equal(digits, sample_categorical(logits, uniform, sampling))


@torch.inference_mode()
def test_a_digit_depends_on_those_before_alone(head):
    hidden, _ = hidden_and_noise(head)
    hidden, rows = hidden.flatten(0, 1), len(head.order)
    before, after = torch.randint(head.quantizer.levels, (2, len(hidden), rows))
    for row in range(rows):
        mixed = torch.cat([before[:, :row], after[:, row:]], dim=1)
        logits = (head.logits(hidden, digits)[:, : row + 1] for digits in (before, mixed))
        torch.testing.assert_close(*logits)


@pytest.fixture
def small():
    """A head of few possible tokens."""
    return tiny(TokenSpec.factorised((1,), (3, 3), values="normal(2,2)"), order=[1, 0])


def all_tokens(head):
    digits = itertools.product(range(head.quantizer.levels), repeat=head.quantizer.dim)
    return head.quantizer.decode(torch.tensor(list(digits)))


@torch.inference_mode()
def test_the_loss_makes_a_distribution(small):
    values = all_tokens(small)
    loss = small.loss(torch.randn(24).expand(1, len(values), -1), values[None])
    assert (-small.quantizer.dim * loss).exp().sum() == pytest.approx(1, abs=1e-5)


@torch.inference_mode()
def test_tokens_are_drawn_from_the_distribution_of_the_loss(small):
    n, hidden, values = 20_000, torch.randn(24), all_tokens(small)
    noise = small.draw_noise(Noise(0, [0]), n)
    drawn = small.sample(hidden.expand(1, n, -1), None, 1.0, noise, Sampling())
    found = (drawn[0, :, None] == values).all(-1).float().mean(0)
    assert found.sum() == 1
    expected = (-2 * small.loss(hidden.expand(1, len(values), -1), values[None])[0]).exp()
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


@torch.inference_mode()
def test_a_number_for_each_level_couples_draws_by_their_maximum(small):
    hidden, n = torch.randn(24), 20_000
    noise = Noise(0, [0]).uniform(n, 2, 3)
    drawn = small.sample(hidden.expand(1, n, -1), None, 1.0, noise, Sampling())
    values = all_tokens(small)
    found = (drawn[0, :, None] == values).all(-1).float().mean(0)
    expected = (-2 * small.loss(hidden.expand(1, len(values), -1), values[None])[0]).exp()
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


@torch.inference_mode()
def test_guidance_is_of_the_hidden_states(head):
    hidden, noise = hidden_and_noise(head)
    null = torch.randn_like(hidden)
    guided = head.sample(hidden, null, 2.5, noise, Sampling())
    alone = head.sample(null + 2.5 * (hidden - null), None, 1.0, noise, Sampling())
    assert torch.equal(guided, alone)


@torch.inference_mode()
def test_the_released_sampler_adds_the_first_step_to_the_first_row():
    """Which is to say: to what training gives that row by its position."""
    ours, theirs = (tiny(PUBLISHED, sampling_adds_first_step=adds) for adds in (False, True))
    theirs.load_state_dict(ours.state_dict())
    hidden, noise = hidden_and_noise(ours, tokens=50)
    drawn = theirs.sample(hidden, None, 1.0, noise, Sampling())
    assert not torch.equal(drawn, ours.sample(hidden, None, 1.0, noise, Sampling()))
    assert torch.equal(theirs.loss(hidden, drawn), ours.loss(hidden, drawn))
    ours.position_embedding[0] += ours.step_embedding[0]
    torch.testing.assert_close(drawn, ours.sample(hidden, None, 1.0, noise, Sampling()))


@torch.inference_mode()
def test_tokens_do_not_depend_on_how_many_are_drawn_at_once(head, monkeypatch):
    hidden, noise = hidden_and_noise(head)
    together = head.sample(hidden, None, 1.0, noise, Sampling())
    monkeypatch.setattr(dimension_wise, "TOKENS_AT_ONCE", 3)
    assert torch.equal(head.sample(hidden, None, 1.0, noise, Sampling()), together)


@torch.inference_mode()
def test_autocast_leaves_the_head_alone(head):
    hidden, noise = hidden_and_noise(head)
    values = head.sample(hidden, hidden / 2, 2.0, noise, Sampling())
    loss = head.loss(hidden, values)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.sample(hidden, hidden / 2, 2.0, noise, Sampling()), values)
        assert torch.equal(head.loss(hidden, values), loss)


def test_an_untrained_head_knows_its_modulations_are_shut():
    """All blocks begin as the identity, whatever the hidden state and the step."""
    head = DimensionWiseHead(**SIZES).fitted(24, PUBLISHED)
    hidden, digits = torch.randn(3, 24), torch.randint(8, (3, 16))
    x = torch.cat([head.condition(hidden)[:, None], torch.zeros(3, 15, 32)], 1)
    fed = head.digit_embedding(digits[:, :-1] + 8 * torch.arange(15))
    x = x + F.pad(fed, (0, 0, 1, 0)) + head.position_embedding
    normed = F.layer_norm(F.layer_norm(x, (32,), eps=1e-6), (32,), eps=1e-6)
    expected = torch.einsum("nrw,rvw->nrv", normed, head.digit_logits.weight)
    torch.testing.assert_close(head.logits(hidden, digits), expected, atol=1e-5, rtol=1e-5)


def test_a_head_learns_values():
    head = DimensionWiseHead(**SIZES, dropout=0.0).fitted(8, TokenSpec.latents((4,), 3)).train()
    hidden, target = torch.randn(2, 4, 8), torch.randn(2, 4, 3)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = head.loss(hidden, target).mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert all(p.grad is not None for p in head.parameters())
    drawn = head.eval().sample(hidden, None, 1.0, torch.rand(2, 4, 3), Sampling(0.0))
    assert torch.equal(drawn, head.quantizer.decode(head.quantizer.quantise(target)))


def test_the_order_is_the_published_one_of_16_channels():
    assert tiny(PUBLISHED).order[:3] == (8, 1, 10)
    assert tiny(TokenSpec.latents((4,), 5)).order == (0, 1, 2, 3, 4)
    for order in ([0, 1], [0, 1, 1], [1, 2, 3]):
        with pytest.raises(UserError, match="is no order of the channels 0 to 2"):
            tiny(TokenSpec.latents((4,), 3), order=order)


def test_latents_get_the_published_levels():
    quantizer = tiny(TokenSpec.latents((4,), 5)).quantizer
    assert (quantizer.levels, quantizer.limit, quantizer.dim) == (64, 5.0, 5)


@pytest.mark.parametrize(
    ("spec", "quantizer"),
    [
        (PUBLISHED, DimensionWise(16, 4)),
        (PUBLISHED, DimensionWise(16, 8, limit=4.0)),
        (TokenSpec.latents((4,), 5), DimensionWise(4)),
    ],
)
def test_a_quantizer_of_other_tokens_is_refused(spec, quantizer):
    with pytest.raises(IncompatibleTokensError, match=r"its quantizer makes .* but it models"):
        tiny(spec, quantizer=quantizer)


def test_heads_must_share_the_width():
    with pytest.raises(UserError, match="width 30 must be a multiple of num_heads 4"):
        DimensionWiseHead(width=30, num_heads=4)


def test_a_fitted_head_is_a_fresh_copy():
    head = DimensionWiseHead(**SIZES, quantizer=DimensionWise(16, 8))
    first, second = head.fitted(24, PUBLISHED), head.fitted(24, PUBLISHED)
    assert first.arguments == second.arguments == head.arguments
    assert not torch.equal(first.condition.weight, second.condition.weight)
    assert not list(head.parameters())


@torch.inference_mode()
def test_drawing_waits_for_no_number():
    """Tensors without numbers go through it: nothing is read back to the host."""
    head = tiny(PUBLISHED).to("meta")
    hidden, noise = torch.empty(5, 24, device="meta"), torch.empty(5, 16, device="meta")
    for sampling in (Sampling(0.9, top_k=3, top_p=0.8), Sampling(0.0)):
        assert head.draw(hidden, noise, sampling).shape == (5, 16)
