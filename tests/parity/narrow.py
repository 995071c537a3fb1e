"""Our perceptual losses around the narrow random networks that cases hold, not the large ones."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

import lpips
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from vistok.losses import LPIPS, ConvNeXtLogits

Weights = dict[str, Tensor]


def narrow_lpips(weights: Weights) -> LPIPS:
    """Return our LPIPS around the package's network with convolutions of the case's widths."""
    with torch.device("meta"):
        net = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    net.scaling_layer = type(net.scaling_layer)()
    left = dict(weights)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(left.pop(f"{name}.weight").float())
            if module.bias is not None:
                module.bias = nn.Parameter(left.pop(f"{name}.bias").float())
    for name, constant in net.scaling_layer.named_buffers():
        if f"scaling_layer.{name}" in left:
            assert torch.allclose(constant, left.pop(f"scaling_layer.{name}"))
    assert not left
    perceptual = LPIPS.__new__(LPIPS)
    nn.Module.__init__(perceptual)
    perceptual.net = net
    return perceptual.requires_grad_(False).eval()


def narrow_convnext(weights: Weights, config: dict, path: Path) -> ConvNeXtLogits:
    """Return our distance by a ConvNeXt of the case's `blocks` (channels in and out, depth) and
    `num_classes`, read from a file at `path`."""
    torch.save(weights, path)
    blocks = [CNBlockConfig(*block) for block in config["blocks"]]
    network = partial(ConvNeXt, blocks, num_classes=config["num_classes"])
    with patch("torchvision.models.convnext_small", network):
        return ConvNeXtLogits(path)
