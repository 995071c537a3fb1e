"""Distances of what frozen networks see: LPIPS (Zhang et al., 2018, arXiv:1801.03924) on VGG-16,
and TiTok's of ConvNeXt's class scores (Yu et al., 2024, arXiv:2406.07550)."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError


@dataclass(frozen=True)
class ImageNetWeights:
    """A file of torchvision's, and how options name what needs it."""

    loss: str
    network: str
    file: str
    option: str
    weight: str

    def read(self, given: str | Path | None) -> tuple[Path, dict[str, Tensor]]:
        """Return the path `given`, by default that in torch hub's cache, and what it holds."""
        path = Path(given or Path(torch.hub.get_dir()) / "checkpoints" / self.file)
        if not path.is_file():
            raise UserError(
                f"{self.loss}: {self.network} weights not found at {path}: put torchvision's "
                f"{self.file} there, give its path as {self.option}, or set {self.weight} to 0"
            )
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling raises whatever a broken stream leads to
            raise UserError(
                f"{self.loss}: {path} is not a readable PyTorch weights file; expected "
                f"torchvision's {self.file}"
            ) from error

    def load(
        self, net: nn.Module, names: dict[str, str], path: Path, state: dict[str, Tensor]
    ) -> None:
        """Give `net` the tensors of `state`, where they are called as `names` say."""
        try:
            tensors = {ours: state[theirs].float() for ours, theirs in names.items()}
            net.load_state_dict(tensors, assign=True)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{self.loss}: {path} does not hold {self.network}; expected torchvision's "
                f"{self.file}"
            ) from error


VGG = ImageNetWeights("LPIPS", "VGG-16", "vgg16-397923af.pth", "lpips_weights", "perceptual_weight")
CONVNEXT = ImageNetWeights(
    "ConvNeXtLogits",
    "ConvNeXt-S",
    "convnext_small-0c510722.pth",
    "convnext_weights",
    "convnext_weight",
)


class Perceptual(nn.Module):
    """Distance of [0, 1] images, one number per image. Frozen, in float32; nothing is downloaded.

    Raises `UserError` if the network's file is absent or holds another network.
    """

    def train(self, mode: bool = True) -> "Perceptual":
        return super().train(False)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b"]:
        with torch.autocast(images.device.type, enabled=False):
            return self.distance(images.float(), reconstruction.float())

    def distance(self, images: Tensor, reconstruction: Tensor) -> Float[Tensor, "b"]:
        raise NotImplementedError


class LPIPS(Perceptual):
    """Without the dropout that calibrated it; package `lpips` holds the calibration.

    Args:
        weights: torchvision's VGG-16 file; None for the one in torch hub's cache.
    """

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        path, state = VGG.read(weights)
        # Imported late: it brings scipy, which training without this loss need not wait for.
        import lpips

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torchvision")  # about lpips' own calls
            self.net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # `slice2.5.weight` of the package is `features.5.weight` of torchvision.
        names = {name: f"features.{name.split('.', 1)[1]}" for name in self.net.net.state_dict()}
        VGG.load(self.net.net, names, path, state)
        self.requires_grad_(False)
        self.eval()

    def distance(self, images: Tensor, reconstruction: Tensor) -> Float[Tensor, "b"]:
        pairs = zip(self._features(images), self._features(reconstruction), strict=True)
        distances = [
            lin((a - b).square()).mean((1, 2, 3))
            for lin, (a, b) in zip(self.net.lins, pairs, strict=True)
        ]
        return torch.stack(distances).sum(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Unit feature vectors of five depths. The package's own forward has a gradient of NaN
        where a feature vector is zero."""
        scaled = self.net.scaling_layer(2 * images - 1)
        return [F.normalize(f, dim=1, eps=1e-10) for f in self.net.net(scaled)]


class ConvNeXtLogits(Perceptual):
    """Mean squared difference of the 1000 class scores of ConvNeXt-S (Liu et al., 2022,
    arXiv:2201.03545) for images resized to 224x224.

    Args:
        weights: torchvision's ConvNeXt-S file; None for the one in torch hub's cache.
    """

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        from torchvision.models import convnext_small

        path, state = CONVNEXT.read(weights)
        with torch.device("meta"):  # drawing its weights would take seconds
            self.net = convnext_small()
        names = {name: name for name in self.net.state_dict()}
        CONVNEXT.load(self.net, names, path, state)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def distance(self, images: Tensor, reconstruction: Tensor) -> Float[Tensor, "b"]:
        return (self.logits(images) - self.logits(reconstruction)).square().mean(1)

    def logits(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        resized = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
        return self.net((resized - self.mean) / self.std)
