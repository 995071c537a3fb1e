"""LPIPS, distance of deep features (Zhang et al., 2018, arXiv:1801.03924), on VGG-16."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError

BACKBONE = "vgg16-397923af.pth"  # torchvision's name for its ImageNet weights


class LPIPS(nn.Module):
    """Perceptual distance of [0, 1] images, one number per image. Frozen, in float32, without the
    dropout that calibrated it. Package `lpips` holds the calibration; nothing is downloaded.

    Args:
        weights: torchvision's VGG-16 file; None for the one in torch hub's cache. Raises
            `UserError` if it is absent or of another network.
    """

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE)
        backbone = _read_backbone(path)
        # Imported late: it brings scipy, which training without this loss need not wait for.
        import lpips

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torchvision")  # about lpips' own calls
            self.net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        _load_backbone(self.net.net, backbone, path)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b"]:
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self._features(images), self._features(reconstruction), strict=True)
            distances = [
                lin((a - b).square()).mean((1, 2, 3))
                for lin, (a, b) in zip(self.net.lins, pairs, strict=True)
            ]
        return torch.stack(distances).sum(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Unit feature vectors of five depths. The package's own forward has a gradient of NaN
        where a feature vector is zero."""
        scaled = self.net.scaling_layer(2 * images.float() - 1)
        return [F.normalize(f, dim=1, eps=1e-10) for f in self.net.net(scaled)]


def _read_backbone(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"LPIPS: VGG-16 weights not found at {path}: put torchvision's {BACKBONE} there, give "
            f"its path as lpips_weights, or set perceptual_weight to 0"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever a broken stream leads to
        raise UserError(
            f"LPIPS: {path} is not a readable PyTorch weights file; expected torchvision's "
            f"{BACKBONE}"
        ) from error


def _load_backbone(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    # `slice2.5.weight` of the package is `features.5.weight` of torchvision.
    names = {name: f"features.{name.split('.', 1)[1]}" for name in net.state_dict()}
    try:
        net.load_state_dict({name: state[theirs] for name, theirs in names.items()})
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"LPIPS: {path} does not hold VGG-16; expected torchvision's {BACKBONE}"
        ) from error
