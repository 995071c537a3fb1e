from dataclasses import dataclass, field

import pytest
import torch
from torchvision.models import convnext_small, vgg16

from vistok.errors import UserError
from vistok.losses import (
    LPIPS,
    ConvNeXtLogits,
    LeCAM,
    PatchDiscriminator,
    ReconstructionLoss,
    StyleGANDiscriminator,
    TiTokDiscriminator,
    TokenizerLoss,
)
from vistok.losses import adversarial as gan


@dataclass
class Result:
    """As a tokenizer's forward pass returns it, as far as losses read it."""

    reconstruction: torch.Tensor | None
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    features: torch.Tensor | None = None
    kept: torch.Tensor | None = None


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """Random weights in the layout of torchvision's file."""
    path = tmp_path_factory.mktemp("lpips") / "vgg16.pth"
    torch.manual_seed(0)
    features = vgg16().features.state_dict()
    torch.save({f"features.{name}": t for name, t in features.items()}, path)
    return path


@pytest.fixture(scope="session")
def convnext_file(tmp_path_factory):
    """Random weights in the layout of torchvision's file."""
    path = tmp_path_factory.mktemp("convnext") / "convnext_small.pth"
    with torch.device("meta"):
        tensors = convnext_small().state_dict()
    generator = torch.Generator().manual_seed(0)
    torch.save(
        {k: 0.1 * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}, path
    )
    return path


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)


def test_reconstruction_kinds():
    black, grey = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    assert ReconstructionLoss("l1")(black, grey) == 0.5
    assert ReconstructionLoss("l2")(black, grey) == 0.25


def test_lpips_is_a_frozen_distance(vgg_file, images):
    x, y = images
    lpips = LPIPS(vgg_file).train()
    assert not any(p.requires_grad for p in lpips.parameters())
    distance = lpips(x, y)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    assert torch.equal(lpips(x, x), torch.zeros(2))
    assert torch.equal(distance, lpips(x, y)), "dropout stays off in training"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance, lpips(x, y))
    torch.testing.assert_close(distance, lpips.net(x, y, normalize=True).flatten())
    distance.sum().backward()
    assert y.grad.abs().sum() > 0


def test_lpips_gradient_is_finite_where_features_vanish(vgg_file):
    lpips = LPIPS(vgg_file)
    last = lpips.net.net.slice5[-2]
    torch.nn.init.constant_(last.bias, -1e4)
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    lpips(torch.rand(1, 3, 32, 32), image).sum().backward()
    assert image.grad.isfinite().all()


def test_lpips_refuses_what_is_not_vgg(tmp_path):
    with pytest.raises(UserError, match="VGG-16 weights not found at"):
        LPIPS(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="not a readable"):
        LPIPS(tmp_path / "text.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold VGG-16"):
        LPIPS(tmp_path / "other.pth")


def test_convnext_is_a_frozen_distance_of_scores(convnext_file, images):
    x, y = images
    distance = ConvNeXtLogits(convnext_file).train()
    assert not any(p.requires_grad for p in distance.parameters())
    assert not distance.net.training
    found = distance(x, y)
    expected = (distance.logits(x) - distance.logits(y)).square().mean(1)
    torch.testing.assert_close(found, expected)
    assert distance.logits(x).shape == (2, 1000)
    assert (found > 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, distance(x, y))
    found.sum().backward()
    assert y.grad.abs().sum() > 0


def test_convnext_refuses_what_is_not_convnext(vgg_file, tmp_path):
    with pytest.raises(UserError, match=r"put torchvision's convnext_small-0c510722\.pth there"):
        TokenizerLoss(convnext_weight=0.1, convnext_weights=tmp_path / "absent.pth")
    with pytest.raises(UserError, match="does not hold ConvNeXt-S"):
        ConvNeXtLogits(vgg_file)


def test_patch_discriminator_is_the_published_one():
    discriminator = PatchDiscriminator()
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    assert discriminator(torch.rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_stylegan_discriminator_is_the_published_one():
    discriminator = StyleGANDiscriminator()
    assert sum(p.numel() for p in discriminator.parameters()) == 36_500_225
    assert discriminator(torch.rand(2, 3, 256, 256)).shape == (2, 1)


def test_stylegan_widths_halve_beyond_32_pixels():
    with torch.device("meta"):
        blocks = StyleGANDiscriminator(1024).blocks
    assert blocks[0].out_channels == 16
    widths = [block.conv_res.out_channels for block in blocks[2:]]
    assert widths == [32, 64, 128, 256, 512, 512, 512, 512]


def test_stylegan_sides_are_powers_of_two():
    assert StyleGANDiscriminator(4, max_channels=2)(torch.rand(1, 3, 4, 4)).shape == (1, 1)
    for side in (2, 48):
        with pytest.raises(UserError, match=f"image_size {side} must be a power of two"):
            StyleGANDiscriminator(side)


def test_titok_discriminator_is_the_published_one():
    discriminator = TiTokDiscriminator()
    widths = [block[0].out_channels for block in discriminator.blocks]
    assert widths == [128, 256, 512]
    assert sum(p.numel() for p in discriminator.parameters()) == 1_909_889
    for side in (256, 100, 5):
        assert discriminator(torch.rand(1, 3, side, side + 1)).shape == (1, 1, 16, 16)
    with pytest.raises(UserError, match="48 channels, expected a multiple of 32"):
        TiTokDiscriminator(48)
    with pytest.raises(UserError, match="num_stages 0"):
        TiTokDiscriminator(num_stages=0)


@pytest.mark.parametrize("side", [1, 2, 5, 6, 9])
def test_halving_blur_pads_as_tensorflow_does(side):
    """Zeros in all for ceil(n / 2) windows of 4, the odd one at the end."""
    x = torch.rand(1, 1, side, side)
    half = -(-side // 2)
    zeros = max(0, (half - 1) * 2 + 4 - side)
    padded = torch.nn.functional.pad(x, (zeros // 2, zeros - zeros // 2) * 2)
    taps = torch.tensor([1.0, 3, 3, 1]) / 8
    windows = padded.unfold(2, 4, 2).unfold(3, 4, 2)
    expected = torch.einsum("bchwij,i,j->bchw", windows, taps, taps)
    blurred = gan.HalvingBlur()(x)
    assert blurred.shape[-2:] == (half, half)
    torch.testing.assert_close(blurred, expected)


def test_blur_keeps_constants_and_spreads_points():
    blur = gan.Blur()
    flat = torch.full((1, 2, 4, 4), 3.0)
    assert torch.equal(blur(flat), flat)
    point = torch.zeros(1, 1, 5, 5)
    point[..., 2, 2] = 16
    expected = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(blur(point)[0, 0, 1:4, 1:4], expected)
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    assert torch.equal(blur(ramp)[0, 0, 0], torch.tensor([0.5, 1, 2, 3, 3.5])), "mirrored border"


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_discriminator_loss_prefers_the_truth(kind):
    high, low = torch.full((4, 1, 2, 2), 3.0), torch.full((4, 1, 2, 2), -3.0)
    right = gan.discriminator_loss(high, low, kind)
    assert right < gan.discriminator_loss(low, low, kind) < gan.discriminator_loss(low, high, kind)
    assert right == 0 if kind == "hinge" else right > 0
    assert gan.generator_loss(high) < gan.generator_loss(low)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_forms_are_their_formulas(sign):
    x = sign * torch.rand(3, 1, 2, 2) * 3
    y = torch.randn(3, 1, 2, 2)
    hinge = 0.5 * ((1 - x).clamp(min=0).mean() + (1 + y).clamp(min=0).mean())
    torch.testing.assert_close(gan.discriminator_loss(x, y, "hinge"), hinge)
    vanilla = -0.5 * (x.sigmoid().log().mean() + (1 - y.sigmoid()).log().mean())
    torch.testing.assert_close(gan.discriminator_loss(x, y, "vanilla"), vanilla)


def test_exchanged_cross_entropy_is_linear_in_the_real_logits_alone():
    real = torch.randn(2, 1, 3, 3, requires_grad=True)
    fake = torch.randn(2, 1, 3, 3, requires_grad=True)
    loss = gan.discriminator_loss(real, fake, "non-saturating")
    above, log2 = torch.tensor(1.0).exp().add(1).log(), torch.tensor(2.0).log()
    torch.testing.assert_close(loss, 0.5 * (above - real.mean() + log2))
    slopes = torch.autograd.grad(loss, (real, fake))
    torch.testing.assert_close(slopes[0], torch.full_like(real, -0.5 / 18))
    assert not slopes[1].any(), "fakes teach nothing"
    forms = [gan.generator_loss(fake, form) for form in ("hinge", "non-saturating")]
    torch.testing.assert_close(forms[1] - forms[0], above)
    torch.testing.assert_close(*(torch.autograd.grad(form, fake)[0] for form in forms))


def test_adaptive_weight_balances_gradients():
    layer = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
    weight = gan.adaptive_weight((3 * layer).sum(), (12 * layer).sum(), layer)
    torch.testing.assert_close(weight, torch.tensor(0.25), rtol=1e-4, atol=0)


def test_lecam_averages_and_penalises_what_leaves_them():
    lecam = LeCAM(decay=0.75)
    real, fake = torch.full((4,), 2.0), torch.full((4,), -2.0, requires_grad=True)
    assert lecam(real, fake) == 8
    assert lecam(fake, real) == 0, "nearer than the averages"
    lecam.update(real, fake)
    assert (lecam.real, lecam.fake) == (0.5, -0.5)
    torch.testing.assert_close(lecam(real, fake), torch.tensor(2 * 2.5**2))
    lecam(real, fake).backward()
    assert (fake.grad < 0).all()
    lecam.update(torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 1.0]))
    assert (lecam.real, lecam.fake) == (0.5, -0.5)


def adversarial_loss(**kwargs):
    settings = {"adversarial_weight": 0.5, "adversarial_start": 10}
    return TokenizerLoss(**settings, **{"discriminator": PatchDiscriminator(4)} | kwargs)


def test_total_is_the_sum_of_its_terms(vgg_file, images):
    x, y = images
    layer = torch.nn.Parameter(torch.ones(()))
    loss = adversarial_loss(perceptual_weight=0.3, lpips_weights=vgg_file, adaptive=True)
    quantizer_losses = {"commitment": torch.tensor(0.7)}
    total, terms = loss.generator_loss(x, Result(y * layer, quantizer_losses), 10, layer)
    assert set(terms) == {"reconstruction", "perceptual", "adversarial", "commitment"}
    torch.testing.assert_close(total, sum(terms.values()))
    torch.testing.assert_close(terms["reconstruction"], (x - y).square().mean())
    assert not any(t.requires_grad for t in terms.values())


def test_convnext_counts_beside_lpips(convnext_file, images):
    x, y = images
    loss = TokenizerLoss(convnext_weight=0.2, convnext_weights=convnext_file)
    total, terms = loss.generator_loss(x, Result(y), 0, None)
    torch.testing.assert_close(terms["convnext"], 0.2 * loss.convnext(x, y).mean().detach())
    torch.testing.assert_close(total, sum(terms.values()))
    assert set(loss.frozen) == {"convnext"}


def test_generator_pass_spares_the_discriminator(images):
    x, y = images
    layer = torch.nn.Parameter(torch.ones(()))
    loss = adversarial_loss(reconstruction_weight=0.0)
    loss.generator_loss(x, Result(y * layer), 10, layer)[0].backward()
    assert layer.grad.abs() > 0
    assert all(p.grad is None for p in loss.discriminator.parameters())
    loss.discriminator_loss(x, y, 10)[0].backward()
    assert all(p.grad is not None for p in loss.discriminator.parameters())


def test_adversary_waits_for_its_start(images):
    x, y = images
    loss = adversarial_loss()
    layer = torch.nn.Parameter(torch.ones(()))
    assert not loss.is_adversarial(9)
    assert loss.is_adversarial(10)
    assert "adversarial" not in loss.generator_loss(x, Result(y), 9, layer)[1]
    assert loss.discriminator_loss(x, y, 9)[0] == 0
    assert loss.discriminator_loss(x, y, 10)[0] > 0


def test_lecam_joins_from_the_start_and_is_saved_with_the_discriminator(images):
    x, y = images
    loss = adversarial_loss(
        lecam_weight=0.5, lecam_decay=0.9, discriminator=TiTokDiscriminator(32, 1)
    )
    before = loss.discriminator_loss(x, y, 9)
    assert before[0] == 0
    assert "lecam" not in before[1]
    assert loss.discriminator.lecam.real == 0
    total, terms = loss.discriminator_loss(x, y, 10)
    hinge = gan.discriminator_loss(loss.discriminator(x), loss.discriminator(y))
    torch.testing.assert_close(total, hinge + terms["lecam"])
    state = loss.discriminator.state_dict()
    torch.testing.assert_close(state["lecam.real"], 0.1 * terms["logits_real"])
    torch.testing.assert_close(state["lecam.fake"], 0.1 * terms["logits_fake"])
    assert not hasattr(adversarial_loss().discriminator, "lecam")


@pytest.mark.parametrize(
    ("discriminator", "message"),
    [
        (StyleGANDiscriminator(64, max_channels=2), "its image_size is 64"),
        (PatchDiscriminator(2, num_layers=4), "sides of at least 48 pixels"),
    ],
)
def test_images_that_cannot_be_judged_are_refused_at_once(images, discriminator, message):
    loss = adversarial_loss(discriminator=discriminator)
    with pytest.raises(UserError, match=message):
        loss.generator_loss(images[0], Result(images[1]), 0, None)


def test_losses_take_their_forms(images):
    x, y = images
    loss = adversarial_loss(
        discriminator=StyleGANDiscriminator(32, max_channels=4),
        discriminator_weight=0.25,
        generator_form="non-saturating",
        discriminator_form="vanilla",
    )
    real, fake = loss.discriminator(x), loss.discriminator(y)
    terms = loss.generator_loss(x, Result(y), 10, None)[1]
    expected = 0.5 * gan.generator_loss(fake, "non-saturating")
    torch.testing.assert_close(terms["adversarial"], expected.detach())
    total = loss.discriminator_loss(x, y, 10)[0]
    torch.testing.assert_close(total, 0.25 * gan.discriminator_loss(real, fake, "vanilla"))


def test_feature_term_counts_up_to_its_step(images):
    result = Result(images[1], {"feature": torch.tensor(0.7)})
    for until, counted in ((None, True), (11, True), (10, False)):
        loss = TokenizerLoss(feature_until=until)
        assert ("feature" in loss.generator_loss(images[0], result, 10, None)[1]) == counted


def test_without_reconstruction_the_tokenizers_own_losses_are_all(images):
    result = Result(None, {"codes": torch.tensor(0.7), "commitment": torch.tensor(0.1)})
    total, terms = TokenizerLoss().generator_loss(images[0], result, 0, None)
    assert terms == result.losses
    torch.testing.assert_close(total, torch.tensor(0.8))
    with pytest.raises(UserError, match="trains without a reconstruction"):
        adversarial_loss().generator_loss(images[0], result, 0, None)


def test_without_adversary_there_is_no_discriminator():
    assert TokenizerLoss().discriminator is None
    assert not TokenizerLoss().is_adversarial(10**9)
    assert TokenizerLoss(discriminator=PatchDiscriminator(2)).discriminator is None
