"""FlexTok: every way to a prefix is the same, and training reaches what is trained."""

from pathlib import Path

import pytest
import torch
import yaml

from vistok.decoding import Noise, Schedule
from vistok.decoding.flow import FlowSampler, Guidance
from vistok.errors import UserError
from vistok.layers.patches import from_patches, to_patches
from vistok.layers.registers import Slots
from vistok.losses.flow import FlowTimes
from vistok.quantizers import FSQ, Gaussian
from vistok.tokenizers import FlexTok, KLAutoencoder, KLTokenizer, Tokenizer
from vistok.tokens import TokenSpec

TINY = {
    "image_size": 16,
    "latent_channels": 3,
    "num_tokens": 8,
    "encoder_width": 24,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "decoder_width": 32,
    "decoder_depth": 3,
    "decoder_heads": 4,
    "time_dim": 17,
    "steps": 3,
}
VARIANTS = {
    "published": {},
    "alike": {"modulation": "alike", "null_condition": "zero"},
    "plain": {
        "encoder_mask": "full",
        "guidance": "linear(1,4)",
        "guidance_momentum": 0.0,
        "guidance_threshold": None,
        "guidance_parallel": 1.0,
    },
}


def vae():
    return KLAutoencoder(3, [8, 8], layers_per_block=1, norm_groups=4, scaling_factor=0.5)


def tiny(**changes):
    """A model with random weights everywhere, so that no layer is inert."""
    model = FlexTok(FSQ([5, 4, 3]), vae(), **(TINY | changes))
    for name, p in model.named_parameters():
        if not name.startswith("vae."):
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(**VARIANTS[request.param])


def images(count=3):
    return torch.rand(count, 3, 16, 16)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_a_prefix_is_the_sequence_cut_off_by_a_length(model):
    tokens = model.encode(images())
    for length in (1, 5, 8):
        lengths = torch.full((3,), length)
        close(model.decode(tokens[:, :length]), model.decode(tokens, lengths))


def test_what_lies_past_a_length_is_not_read(model):
    tokens, lengths = model.encode(images()), torch.tensor([1, 5, 8])
    others = torch.where(torch.arange(8) < lengths[:, None], tokens, 0)
    assert not torch.equal(tokens, others)
    close(model.decode(tokens, lengths), model.decode(others, lengths))
    assert not torch.allclose(model.decode(tokens, lengths), model.decode(tokens), atol=1e-3)


def test_lengths_of_a_batch_are_those_of_calls_on_their_own(model):
    tokens, lengths = model.encode(images()), torch.tensor([2, 6, 7])
    together = model.decode(tokens, lengths, noise=Noise(3, range(3)))
    for i, length in enumerate(lengths.tolist()):
        alone = model.decode(tokens[i : i + 1, :length], noise=Noise(3, [i]))
        close(together[i : i + 1], alone)


def test_merged_registers_are_the_registers(model):
    codes = model.quantizer.decode(model.encode(images()))[:, :3]
    decoder, x = model.decoder, torch.randn(3, 3, 8, 8)
    modulations = decoder.modulations(torch.rand(3))
    merged, null = decoder.slots(codes), decoder.null_slots(3)
    for slots in (merged, null):
        copied = slots.rows[:, -1:].expand(-1, slots.copies, -1)
        full = Slots(torch.cat([slots.rows[:, :-1], copied], dim=1))
        assert full.rows.shape[1] == 8
        for few, all_of_them in zip(
            decoder(x, slots, modulations), decoder(x, full, modulations), strict=True
        ):
            close(few, all_of_them)
    dropped = decoder.drop(merged, torch.tensor([True, False, True]))
    expected = decoder(x, null, modulations)[0]
    close(decoder(x, dropped, modulations)[0][::2], expected[::2])


def test_the_noise_of_an_image_is_its_own(model):
    tokens = model.encode(images())
    first = model.decode(tokens, noise=Noise(1, [7, 8, 9]))
    assert torch.equal(first, model.decode(tokens, noise=Noise(1, [7, 8, 9])))
    close(first[1:2], model.decode(tokens[1:2], noise=Noise(1, [8])))
    assert not torch.allclose(first, model.decode(tokens, noise=Noise(2, [7, 8, 9])), atol=1e-3)
    assert torch.equal(model.decode(tokens), model.decode(tokens, noise=Noise(0, range(3))))


def test_registers_read_only_those_before_them():
    model = tiny()
    x = torch.randn(2, 3, 8, 8)
    z = model.encoder(x)
    with torch.no_grad():
        model.encoder.registers[4:].normal_()
    changed = model.encoder(x)
    close(changed[:, :4], z[:, :4])
    assert not torch.allclose(changed[:, 4:], z[:, 4:], atol=1e-3)


def test_maps_of_other_sizes_and_no_autoencoder():
    model = FlexTok(FSQ([5, 4, 3]), **(TINY | {"image_size": [8, 12]})).eval()
    for size in ((8, 12), (4, 12), (8, 2)):
        tokens = model.encode_latents(torch.randn(2, 3, *size))
        assert tokens.shape == (2, 8)
        assert model.decode_latents(tokens, size=size).shape == (2, 3, *size)
    with pytest.raises(UserError, match="a map of 10x12: expected multiples of 2 up to 8x12"):
        model.encode_latents(torch.randn(2, 3, 10, 12))
    with pytest.raises(UserError, match="no vae"):
        model.encode(images())
    with pytest.raises(UserError, match="no vae"):
        model.decode(tokens)


@pytest.mark.parametrize("tail_drop", ["uniform(sample)", "pow2", "uniform_pow2(sample)"])
def test_a_training_step_reaches_what_is_trained(tail_drop):
    model = tiny(alignment_dim=5, tail_drop=tail_drop, condition_dropout=0.5).train()
    result = model(images(16))
    assert result.reconstruction is None
    assert result.features.shape == (16, 4, 4, 5)
    assert result.kept.shape == (16,) and 0 < result.kept.min() <= result.kept.max() <= 1
    (result.losses["flow"] + result.features.square().mean()).backward()
    for name, p in model.named_parameters():
        if name.startswith("vae."):
            assert not p.requires_grad and p.grad is None
        else:
            assert p.grad is not None and p.grad.isfinite().all(), name
    assert model.encoder.blocks[0].attention.qkv.weight.grad.abs().sum() > 0


def test_training_from_the_start_lowers_the_loss():
    torch.manual_seed(1)
    model = FlexTok(FSQ([5, 4, 3]), vae(), **TINY).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    pictures, losses = images(16), []
    for _ in range(40):
        loss = model(pictures).losses["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint() == model.fingerprint()
    tokens = model.encode(images())
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))
    quick = Tokenizer.from_pretrained(tmp_path, steps=1, guidance=1.0)
    assert (quick.sampler.steps, quick.sampler.scale) == (1, Schedule(1))


def test_starts_from_its_autoencoder(tmp_path):
    stage0 = KLTokenizer(Gaussian(3), vae(), 16).eval()
    pictures = images()
    stage0.save_pretrained(tmp_path)
    model = tiny()
    before = model.encoder.registers.clone()
    model.start_from(Tokenizer.from_pretrained(tmp_path))
    assert torch.equal(model.encoder.registers, before)
    latents = stage0.encode(pictures)
    close(model.vae.encode(pictures), latents.permute(0, 3, 1, 2))
    close(model.vae.decode(latents.permute(0, 3, 1, 2)).clamp(0, 1), stage0.decode(latents))
    other = tiny()
    other.start_from(model)
    assert other.fingerprint() == model.fingerprint()
    wide = KLTokenizer(Gaussian(3), KLAutoencoder(3, [12, 8], 1, 4), 16)
    with pytest.raises(UserError, match="cannot start from this KLTokenizer"):
        model.start_from(wide)


def test_an_autoencoder_trains_as_a_tokenizer():
    model = KLTokenizer(Gaussian(3), vae(), 16).train()
    result = model(images())
    (result.reconstruction.square().mean() + result.losses["kl"]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert result.usage["deviation"] > 0
    with pytest.raises(UserError, match="autoencoder's 3 channels, not 4"):
        KLTokenizer(Gaussian(4), vae(), 16)


def test_projected_guidance_may_be_plain():
    cond, uncond = torch.randn(2, 3, 2, 4, 4)
    plain, _ = Guidance(0.0, None, 1.0)(cond, uncond, 3.0)
    close(plain, uncond + 3 * (cond - uncond))
    across, _ = Guidance(0.0, None, 0.0)(cond, uncond, 3.0)
    assert ((across - cond) * cond).sum((1, 2, 3)).abs().max() < 1e-4
    limited, _ = Guidance(0.0, 0.1, 1.0)(cond, uncond, 3.0)
    close((limited - cond).flatten(1).norm(dim=1), torch.full((3,), 0.2))
    first, past = Guidance(-0.5, None, 1.0)(cond, uncond, 3.0)
    second, _ = Guidance(-0.5, None, 1.0)(cond, uncond, 3.0, past)
    close(second - cond, (first - cond) / 2)


def test_a_straight_flow_arrives_in_one_step_or_many():
    data, noise = torch.randn(2, 3, 2, 4, 4)
    steps_without = []

    def null(x, step):
        steps_without.append(step)
        return noise - data

    for steps in (1, 7):
        sampler = FlowSampler(steps, Schedule("interval(3,0.5,1)"))
        close(sampler(noise, lambda x, step: noise - data, null), data)
    assert steps_without == [4, 5, 6]
    assert FlowSampler(4).times.tolist() == [1, 0.75, 0.5, 0.25]
    with pytest.raises(UserError, match="0 steps"):
        FlowSampler(0)


@pytest.mark.parametrize("form", ["uniform", "logit_normal", "stratified", "mode(1.29)"])
def test_flow_times(form):
    times = FlowTimes(form).draw(1000, torch.device("cpu"))
    assert 0 <= times.min() < times.max() <= 1
    assert abs(times.mean() - 0.5) < 0.05
    if form == "stratified":
        assert torch.equal(times, times.sort().values)


@pytest.mark.parametrize("wrong", ["normal", "mode", "mode(a)", "uniform(1)"])
def test_flow_times_refuses(wrong):
    with pytest.raises(UserError, match="flow times"):
        FlowTimes(wrong)


def test_patches_are_row_column_channel():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = to_patches(x, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[0, 4, :3], x[0, :, 2, 2])
    assert torch.equal(patches[0, 4, 3:6], x[0, :, 2, 3])
    assert torch.equal(from_patches(patches, (2, 3), 2), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 4}, "latent_channels 4 must be the 3 of the vae"),
        ({"image_size": 18}, "18x18 must be divisible by 4"),
        ({"encoder_heads": 5}, "width 24 must be a multiple of 5 heads"),
        ({"encoder_width": 26}, "width 26 must be a multiple of 4"),
    ],
)
def test_refuses_sizes(changes, message):
    with pytest.raises(UserError, match=message):
        FlexTok(FSQ([5, 4, 3]), vae(), **(TINY | changes))


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [("d12_d12", 85.4, 172.4), ("d18_d18", 287.3, 578.6), ("d18_d28", 287.3, 2169.7)],
)
def test_published_sizes(name, encoder, decoder):
    file = Path(__file__).parents[2] / f"configs/tokenizers/flextok_{name}.yaml"
    arguments = yaml.safe_load(file.read_text())["tokenizer"]["init_args"]
    with torch.device("meta"):
        vae = KLAutoencoder(**arguments.pop("vae")["init_args"])
        quantizer = FSQ(**arguments.pop("quantizer")["init_args"])
        model = FlexTok(quantizer, vae, **arguments)
    counts = [  # published with the tables of positions, which are stored but not trained
        sum(tensor.numel() for tensor in part.state_dict().values()) / 1e6
        for part in (model.encoder, model.decoder, model.vae)
    ]
    assert counts == pytest.approx([encoder, decoder, 83.8], abs=0.06)
    assert model.spec == TokenSpec.ids((256,), 64_000, ordered=True)
