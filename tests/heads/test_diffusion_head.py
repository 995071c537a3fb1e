"""The heads that denoise single tokens: diffusion and flow."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vistok.checkpoints import mar
from vistok.decoding import Noise, Sampler, Sampling
from vistok.decoding.diffusion import NUM_TIMES, chain
from vistok.errors import CheckpointError, UserError
from vistok.heads import DiffusionHead, FlowHead
from vistok.heads.diffusion import HALF_BIN, binned_log_likelihood, gaussian_divergence
from vistok.layers import denoiser
from vistok.tokens import TokenSpec

HIDDEN, CHANNELS, TOKENS = 6, 3, 5
SPEC = TokenSpec.latents((4, 4), CHANNELS)
HEADS = pytest.mark.parametrize("kind", [DiffusionHead, FlowHead])


def tiny(kind, **options):
    """A head with weights as if it had learned something."""
    head = kind(width=16, depth=2, **options).fitted(HIDDEN, SPEC).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return head


def draw(head, hidden, null=None, scale=1.0, steps=6, noise=None, **sampling):
    """Tokens drawn by a sampler that tiny heads do not drive to infinity."""
    if isinstance(head, DiffusionHead):
        sampling.setdefault("sampler", Sampler("ddpm(800)"))
    sampling = Sampling(**sampling)
    if noise is None:
        indices = range(len(hidden))
        noise = head.draw_noise(Noise(7, indices), hidden.shape[1], sampling, steps)
    with torch.no_grad():
        return head.sample(hidden, null, scale, noise, sampling, steps)


@HEADS
def test_modulations_of_many_steps_are_those_of_each(kind, monkeypatch):
    head = tiny(kind)
    hidden, null = torch.randn(2, 2, TOKENS, HIDDEN)
    x, times = torch.randn(2, TOKENS, CHANNELS), torch.tensor([900.0, 412.5, 30.0, 0.0])
    for rows in (1, 40, 512):  # a step, two and all at a time
        monkeypatch.setattr(denoiser, "ROWS_AHEAD", rows)
        networks = list(head.net.at(times, hidden, null))
        assert len(networks) == len(times)
        for network, time in zip(networks, times, strict=True):
            for half, given in zip(network(x), (hidden, null), strict=True):
                alone = head.net(x, time.expand(x.shape[:-1]), given)
                torch.testing.assert_close(half, alone, rtol=1e-5, atol=1e-6)


@HEADS
def test_scale_one_is_no_guidance_and_scale_zero_the_null_condition(kind):
    head = tiny(kind)
    hidden, null = torch.randn(2, 2, TOKENS, HIDDEN)
    plain = draw(head, hidden)
    torch.testing.assert_close(draw(head, hidden, null, 1.0), plain, rtol=1e-4, atol=1e-4)
    away = draw(head, hidden, null, 3.0)
    assert not torch.allclose(away, plain, atol=1e-2)
    if kind is FlowHead:  # of which the variance, too, is conditional in diffusion
        torch.testing.assert_close(draw(head, hidden, null, 0.0), draw(head, null))


def test_guidance_is_of_the_noise_and_leaves_the_variance_to_the_condition():
    head = tiny(DiffusionHead)
    hidden, null = torch.randn(2, 1, TOKENS, HIDDEN)
    noise = torch.randn(1, TOKENS, 2, CHANNELS)
    sampling = Sampling(sampler=Sampler("ddpm(800)"))
    first, last = chain(sampling.sampler, 2).steps
    with torch.no_grad():
        x = noise[:, :, 0]
        for step, fresh in ((first, noise[:, :, 1]), (last, None)):
            times = torch.full(x.shape[:-1], step.time)
            conditional, unconditional = (head.net(x, times, z) for z in (hidden, null))
            eps, v = conditional.chunk(2, dim=-1)
            other, _ = unconditional.chunk(2, dim=-1)
            x = step(x, other + 2.5 * (eps - other), v, fresh)
    ours = draw(head, hidden, null, 2.5, steps=2, noise=noise)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@HEADS
def test_tokens_depend_on_their_own_rows_alone(kind):
    head = tiny(kind)
    hidden, null = torch.randn(2, 3, TOKENS, HIDDEN)
    together = draw(head, hidden, null, 2.0)
    alone = torch.cat([draw(head, hidden[:1], null[:1], 2.0), together[1:]])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    noise = head.draw_noise(Noise(1, range(3)), TOKENS, budget=6)
    whole, some = (
        draw(head, hidden[:, part], noise=noise[:, part]) for part in (slice(None), slice(1, 3))
    )
    torch.testing.assert_close(whole[:, 1:3], some, rtol=1e-4, atol=1e-4)


def test_temperature_is_of_the_noise_that_the_chain_adds():
    head = tiny(DiffusionHead)
    hidden, noise = torch.randn(2, TOKENS, HIDDEN), torch.randn(2, TOKENS, 6, CHANNELS)
    cooled = torch.cat([noise[:, :, :1], 0.7 * noise[:, :, 1:]], dim=2)
    ours = draw(head, hidden, noise=noise, temperature=0.7)
    torch.testing.assert_close(ours, draw(head, hidden, noise=cooled))
    silent = torch.cat([noise[:, :, :1], torch.zeros_like(noise[:, :, 1:])], dim=2)
    ours = draw(head, hidden, noise=noise, temperature=0.0)
    torch.testing.assert_close(ours, draw(head, hidden, noise=silent))


def test_temperature_of_a_flow_is_of_its_start():
    head = tiny(FlowHead)
    hidden, noise = torch.randn(2, TOKENS, HIDDEN), torch.randn(2, TOKENS, 1, CHANNELS)
    ours = draw(head, hidden, noise=noise, temperature=0.7)
    torch.testing.assert_close(ours, draw(head, hidden, noise=0.7 * noise))


@pytest.mark.parametrize(
    ("spelling", "steps", "draws"),
    [
        ("ddpm", 6, 6),
        ("ddpm(950)", 30, 29),
        ("sections(2,0,3)", 1, 5),
        ("ddim", 10, 1),
        ("dpm", 6, 1),
        ("dpm_pp", 6, 1),
    ],
)
def test_each_sampler_draws_what_it_uses(spelling, steps, draws):
    head = tiny(DiffusionHead)
    sampling = Sampling(sampler=Sampler(spelling))
    noise = head.draw_noise(Noise(0, [4, 9]), TOKENS, sampling, steps)
    assert noise.shape == (2, TOKENS, draws, CHANNELS)
    hidden = torch.randn(2, TOKENS, HIDDEN)
    assert draw(head, hidden, noise=noise, sampler=sampling.sampler, steps=steps).isfinite().all()


def test_samplers_that_a_head_has_not():
    with pytest.raises(UserError, match="FlowHead has no sampler 'ddpm': only euler"):
        tiny(FlowHead).check_sampler("ddpm")
    with pytest.raises(UserError, match="no stride"):
        draw(tiny(DiffusionHead), torch.randn(1, 1, HIDDEN), sampler=Sampler("ddim"), steps=37)


@HEADS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fresh_head_is_finite_and_the_same_under_autocast(kind, dtype):
    head = kind(width=16, depth=2).fitted(HIDDEN, SPEC)
    hidden = torch.randn(2, TOKENS, HIDDEN).to(dtype)
    target = torch.randn(2, TOKENS, CHANNELS)
    results = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = head.loss(hidden, target)
            results.append([loss, draw(head, hidden, hidden, 4.0, sampler=None, steps=100)])
    for before, after in zip(*results, strict=True):
        assert before.dtype == torch.float32
        assert before.isfinite().all()
        assert torch.equal(before, after)


@HEADS
def test_a_head_of_half_precision_draws_and_learns(kind):
    head = tiny(kind).to(torch.bfloat16)
    hidden = torch.randn(2, TOKENS, HIDDEN, dtype=torch.bfloat16)
    assert draw(head, hidden).dtype == torch.float32
    head.loss(hidden, torch.randn(2, TOKENS, CHANNELS)).sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@HEADS
def test_a_fresh_head_predicts_nothing(kind):
    head = kind(width=16, depth=2, batch_mul=1).fitted(HIDDEN, SPEC)
    hidden, target = torch.randn(64, TOKENS, HIDDEN), torch.randn(64, TOKENS, CHANNELS)
    times, noise = torch.full(hidden.shape[:2], 500), torch.randn(target.shape)
    if kind is FlowHead:
        times = times / NUM_TIMES
        error = head.loss_at(hidden, target, times, noise)
        wanted = (noise - target).square().mean(-1)
    else:
        error, _ = head.loss_at(hidden, target, times, noise)
        wanted = noise.square().mean(-1)
    torch.testing.assert_close(error, wanted)


@HEADS
def test_the_loss_is_a_mean_over_noisy_copies(kind, monkeypatch):
    """Which need not be made one by one."""
    head = tiny(kind, batch_mul=3)
    hidden, target = torch.randn(2, TOKENS, HIDDEN), torch.randn(2, TOKENS, CHANNELS)
    drawn = []
    at = head.loss_at
    monkeypatch.setattr(head, "loss_at", lambda *given: drawn.append(given[2:]) or at(*given))
    loss = head.loss(hidden, target)
    ((times, noise),) = drawn
    assert times.shape == (3, 2, TOKENS)
    copies = []
    for some_times, some_noise in zip(times, noise, strict=True):
        terms = at(hidden, target, some_times, some_noise)
        copies.append(sum(terms) if kind is DiffusionHead else terms)
    torch.testing.assert_close(loss, sum(copies) / 3)


def test_noise_learns_from_its_error_alone_and_variance_from_the_bound():
    head = tiny(DiffusionHead)
    hidden, target = torch.randn(2, TOKENS, HIDDEN), torch.randn(2, TOKENS, CHANNELS)
    times = torch.tensor([[0, 1, 400, 900, 999]] * 2)
    terms = head.loss_at(hidden, target, times, torch.randn(target.shape))
    for term, silent in zip(terms, (slice(CHANNELS, None), slice(CHANNELS)), strict=True):
        (gradient,) = torch.autograd.grad(term.sum(), head.net.output.bias, retain_graph=True)
        assert (gradient[silent] == 0).all()
        assert (gradient != 0).sum() == CHANNELS


def test_the_divergence_is_that_of_gaussians():
    distance, true, predicted = torch.randn(3, 50)
    torch.testing.assert_close(
        gaussian_divergence(distance[:, None], true[:, None], predicted[:, None])[:, 0],
        kl_divergence(Normal(distance, (true / 2).exp()), Normal(0.0, (predicted / 2).exp())),
    )


@pytest.mark.parametrize("log_variance", [-12.0, -4.0, 1.0])
def test_the_likelihoods_of_all_bins_add_up_to_one(log_variance):
    values = torch.linspace(-1, 1, 256)[:, None]
    for mean in (-1.5, 0.1, 0.9999):
        variances = torch.full_like(values, log_variance)
        logs = binned_log_likelihood(values, values - mean, variances)
        assert logs.exp().sum().item() == pytest.approx(1, abs=1e-4)
        # A bin inside holds its width times the density, but for the approximation.
        if log_variance > 0:
            density = Normal(mean, math.exp(log_variance / 2)).log_prob(values[1:-1])
            expected = density + math.log(2 * HALF_BIN)
            torch.testing.assert_close(logs[1:-1], expected, atol=0.02, rtol=0)


@HEADS
def test_heads_learn_a_law_for_each_hidden_state(kind):
    """Two unequal clouds, and one whose coordinates are tied."""
    torch.manual_seed(0)
    head = kind(width=48, depth=2, batch_mul=1).fitted(2, TokenSpec.latents((1,), 2))
    passes = 250
    optimiser = torch.optim.AdamW(head.parameters(), lr=5e-3, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, passes)

    def data(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.eye(2)[torch.arange(rows) % 2][:, None]
        centres = torch.where(torch.rand(rows, 1, 1) < 0.25, -1.0, 1.0)
        clouds = centres + 0.3 * torch.randn(rows, 1, 2)
        tied = 0.3 + 0.6 * torch.randn(rows, 1, 1) * torch.tensor([1.0, -1.0])
        tied = tied + 0.2 * torch.randn(rows, 1, 2)
        return hidden, torch.where(hidden[..., :1] == 1, clouds, tied)

    losses = []
    for _ in range(passes):
        loss = head.loss(*data(256)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])

    hidden, wanted = data(2000)
    sampler = Sampler("ddpm(950)") if kind is DiffusionHead else None
    drawn = draw(head, hidden, steps=20, sampler=sampler)
    for label in range(2):
        ours, theirs = (x[label::2, 0].T for x in (drawn, wanted))
        torch.testing.assert_close(ours.mean(1), theirs.mean(1), atol=0.15, rtol=0)
        torch.testing.assert_close(ours.cov(), theirs.cov(), atol=0.2, rtol=0)


def test_published_weights_of_a_head_alone():
    head = tiny(DiffusionHead)
    published = as_published(head)
    for prefix in ("", "diffloss."):
        ours = mar.head({prefix + name: tensor for name, tensor in published.items()})
        hidden = torch.randn(1, TOKENS, HIDDEN)
        torch.testing.assert_close(draw(ours.eval(), hidden), draw(head, hidden))
    missing = {k: v for k, v in published.items() if "res_blocks.1.mlp.0.bias" not in k}
    for wrong in (missing, {**published, "more": torch.zeros(1)}, {"other": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match=r"file\.pth"):
            mar.head(wrong, where="file.pth")


def as_published(head: DiffusionHead) -> dict[str, torch.Tensor]:
    """The head's weights under their published names."""
    names = {"time.": "time_embed.mlp.", "condition.": "cond_embed.", "input.": "input_proj."}
    names |= {"output.": "final_layer.linear.", "blocks.": "res_blocks."}
    names |= {".norm.": ".in_ln.", ".fc1.": ".mlp.0.", ".fc2.": ".mlp.2."}
    weights = {}
    for name, tensor in head.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor.clone()
    bias = weights.pop("net.modulation.bias").view(-1, head.width)
    bias[1::3] -= 1
    matrix = weights.pop("net.modulation.weight").view(-1, head.width, head.width)
    for i in range(head.depth + 1):
        part = f"res_blocks.{i}" if i < head.depth else "final_layer"
        rows = slice(3 * i, 3 * i + 3)
        weights[f"net.{part}.adaLN_modulation.1.weight"] = matrix[rows].flatten(0, 1)
        weights[f"net.{part}.adaLN_modulation.1.bias"] = bias[rows].flatten()
    return weights
