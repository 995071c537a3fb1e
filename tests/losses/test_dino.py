"""The adversary on frozen features, and the parts of the recipe that it is trained by."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from vistok.errors import UserError
from vistok.losses import DINODiscriminator, TokenizerLoss
from vistok.losses.dino import augmented


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Directory of a vision transformer of four patches."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=16, patch_size=8, intermediate_size=16, **sizes)
    transformers.ViTModel(config).save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def discriminator(path):
    return DINODiscriminator(path, depths=(0, 2), kernel_size=3)


def test_heads_judge_the_patches_of_the_states_asked_for(path, discriminator):
    images = torch.rand(2, 3, 16, 16)
    net = transformers.ViTModel.from_pretrained(path)
    states = net((images - 0.5) / 0.5, output_hidden_states=True).hidden_states
    expected = [
        head(states[i][:, 1:].transpose(1, 2))
        for head, i in zip(discriminator.eval().heads, (0, 1, 3), strict=True)
    ]
    torch.testing.assert_close(discriminator(images), torch.cat(expected, 1), atol=1e-5, rtol=1e-4)


def test_the_gradient_reaches_images_and_heads_but_no_feature(discriminator):
    images = torch.rand(2, 3, 24, 24, requires_grad=True)
    discriminator(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is not None for p in discriminator.heads.parameters())
    assert all(p.grad is None for p in discriminator.teacher.parameters())
    assert not discriminator.teacher.net.training


def test_depths_that_are_not_there_are_refused(path):
    with pytest.raises(UserError, match="has 3 blocks"):
        DINODiscriminator(path, depths=(3,))


def test_augmentation_shifts_blots_and_recolours():
    images = torch.full((400, 3, 20, 20), 0.5)
    seen = augmented(images, cutout=0.2)
    blank = (seen == 0).all(1)
    # Of 20 pixels up to 3 are shifted out, 12/7 on average, and the square has up to 3 of a side.
    assert 0.1 < blank.float().mean() < 0.25
    shade = seen.amax((1, 2, 3))
    assert 0.24 < shade.min() < 0.3 and 0.7 < shade.max() <= 0.75
    grey = torch.rand(50, 1, 20, 20).expand(-1, 3, -1, -1)
    torch.testing.assert_close(augmented(grey, 0.2).std(1), torch.zeros(50, 20, 20))
    first, again = (augmented(images[:1], 0.2) for _ in range(2))
    assert not torch.equal(first, again)


def result(images, last_layer):
    return SimpleNamespace(reconstruction=images * last_layer, losses={}, features=None, kept=None)


def test_the_weight_of_the_adversary_rises_to_its_own_and_has_a_floor(discriminator):
    images, last = torch.rand(2, 3, 16, 16), torch.nn.Parameter(torch.tensor(0.5))
    loss = TokenizerLoss(
        adversarial_weight=0.4,
        adversarial_start=10,
        adversarial_warmup=4,
        discriminator=discriminator.eval(),
    )

    def adversarial(step):
        return loss.generator_loss(images, result(images, last), step, last)[1]["adversarial"]

    whole = adversarial(20)
    for step, share in ((10, 0.25), (12, 0.75), (13, 1.0)):
        torch.testing.assert_close(adversarial(step), share * whole)
    loss.adaptive, loss.adaptive_floor = True, 1e6
    torch.testing.assert_close(adversarial(20), whole / 0.4 * 1e6)


def test_absolute_differences_count_beside_squared_ones():
    images, last = torch.rand(2, 3, 16, 16), torch.nn.Parameter(torch.tensor(0.5))
    total, terms = TokenizerLoss(l1_weight=0.4).generator_loss(
        images, result(images, last), 0, last
    )
    torch.testing.assert_close(terms["l1"], 0.4 * images.mean() / 2)
    torch.testing.assert_close(total, terms["reconstruction"] + terms["l1"])


def test_consistency_is_that_of_two_looks(discriminator):
    images = torch.rand(4, 3, 16, 16)
    loss = TokenizerLoss(
        adversarial_weight=1.0,
        adversarial_start=0,
        consistency_weight=4.0,
        discriminator=discriminator,
    )
    terms = loss.discriminator_loss(images, images.flip(0), 0)[1]
    assert terms["consistency"] > 0
    discriminator.eval()  # which augments nothing
    assert loss.discriminator_loss(images, images.flip(0), 0)[1]["consistency"] < 1e-10
