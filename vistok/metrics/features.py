"""The networks in whose features sets of images are compared: torch-fidelity's, and a random one.

Weights are read from the path given, else from torch hub's cache, else downloaded into it; what is
missing is said at once, before any image is made.
"""

import hashlib
import io
import logging
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity import feature_extractor_clip as clip
from torch_fidelity import feature_extractor_dinov2 as dinov2
from torch_fidelity import feature_extractor_inceptionv3 as inception

from vistok.errors import UserError, suggestion

logger = logging.getLogger(__name__)

NAMES = ("inception", "random", *dinov2.MODEL_METADATA, *clip.MODEL_METADATA)
HELP = "or take --features random, which needs no file and is not comparable with published numbers"


@dataclass(frozen=True)
class Features:
    """`vectors` to compare; `logits` over classes, of width 0 where the network has none."""

    vectors: Float[Tensor, "b d"]
    logits: Float[Tensor, "b c"]


class FeatureNetwork(nn.Module):
    """Images to features, in float32 whatever the surroundings. `extractor` returns a tuple of
    vectors and, if it classifies, logits.

    Attributes: `label`, network and weights as a protocol states them; `dim` of a vector;
    `num_logits`, 0 where the network does not classify.
    """

    def __init__(self, extractor: nn.Module, label: str):
        super().__init__()
        self.extractor = extractor
        self.label = label
        probe = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        self.dim, self.num_logits = probe.vectors.shape[1], probe.logits.shape[1]

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Features:
        with (
            torch.autocast(images.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            vectors, *logits = self.extractor(images)
        return Features(vectors, logits[0] if logits else vectors[:, :0])


class RandomInception(inception.FeatureExtractorInceptionV3):
    """The Inception of FID with random weights, on small images, at two depths (192 and 768
    channels): cheap, without a file, the same everywhere. It tells sharp from blurred and pictures
    from noise."""

    INPUT_IMAGE_SIZE = 75  # the least that the layers take

    def __init__(self, seed: int = 0):
        self.seed = seed
        super().__init__(
            "random-inception", ["192", "768"], feature_extractor_weights_path=_as_file({})
        )

    def load_state_dict(self, state_dict, **kwargs):
        """Draw the weights (He et al., 2015) where the parent's constructor would load them."""
        generator = torch.Generator().manual_seed(self.seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        shallow, deep = super().forward(x)
        # Deep channels vary less: so scaled, both depths count, and distances are of FID's order.
        return (torch.cat([3 * shallow, 10 * deep], dim=1),)


def load_features(name: str = "inception", weights: str | Path | None = None) -> FeatureNetwork:
    """Return the feature network `name`, frozen, on the CPU.

    - `inception`: FID's InceptionV3, 2048 features and 1008 logits;
    - `dinov2-vit-{s,b,l,g}-14`; `clip-rn50` ... `clip-vit-l-14-336px`;
    - `random`: a seeded random Inception; its numbers compare with one another only.

    `weights` is the file of torch-fidelity's release; for DINOv2, whose code comes from torch hub
    too, a hub directory. Raises `UserError` for an unknown name, and for weights that are absent,
    damaged, pickled or of another network.
    """
    if name not in NAMES:
        raise UserError(f"features '{name}': none of {', '.join(NAMES)}{suggestion(name, NAMES)}")
    # Building a network draws initial weights, which must not shift the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        if name == "random":
            if weights is not None:
                raise UserError(f"features 'random' take no weights, got {weights}")
            label = "random-inception (not comparable with published FID)"
            return FeatureNetwork(RandomInception(), label)
        if name == "inception":
            return _inception(weights)
        return _clip(name, weights) if name in clip.MODEL_METADATA else _dinov2(name, weights)


def _inception(weights: str | Path | None) -> FeatureNetwork:
    url = inception.URL_INCEPTION_V3
    file_name = url.rsplit("/", 1)[1]
    # Torch hub's convention: a file name ends in the beginning of its SHA-256.
    path = _find("inception", file_name, url, file_name[:-4].rsplit("-", 1)[1] + "...", weights)
    try:
        # torch-fidelity would unpickle the file; it gets a copy of what a safe reader let through.
        state = torch.load(path, map_location="cpu", weights_only=True)
        extractor = inception.FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=_as_file(state),
        )
    except Exception as error:  # unpickling raises whatever a broken stream leads to
        raise UserError(
            f"features 'inception': {path} does not hold torch-fidelity's InceptionV3 ({file_name})"
        ) from error
    return FeatureNetwork(extractor, f"inception-v3-compat (sha256 {_sha256(path)[:16]})")


def _clip(name: str, weights: str | Path | None) -> FeatureNetwork:
    expected = clip.MODEL_METADATA[name]["hash"]
    path = _find(name, f"{name}-{expected}.pt", clip.MODEL_URLS[name], expected, weights)
    # The file is a TorchScript archive, which holds code: only the published one is opened.
    if _sha256(path) != expected:
        raise UserError(f"features '{name}': {path} has another SHA-256 than {expected}")
    extractor = clip.FeatureExtractorCLIP(name, ["clip"], feature_extractor_weights_path=str(path))
    return FeatureNetwork(extractor, f"{name} (sha256 {expected[:16]})")


def _dinov2(name: str, hub: str | Path | None) -> FeatureNetwork:
    before = torch.hub.get_dir()
    entry = dinov2.MODEL_METADATA[name]
    code = Path(hub or before, "facebookresearch_dinov2_main", "hubconf.py")
    path = Path(hub or before, "checkpoints", f"{entry}_pretrain.pth")
    for needed in (code, path):
        if not needed.exists():
            raise UserError(
                f"features '{name}': {needed} is missing: run torch.hub.load("
                f"'facebookresearch/dinov2', '{entry}') once where there is a network, give its "
                f"hub directory as --feature_weights, {HELP}"
            )
    torch.hub.set_dir(hub or before)
    try:
        extractor = dinov2.FeatureExtractorDinoV2(name, ["dinov2"])
    finally:
        torch.hub.set_dir(before)
    return FeatureNetwork(extractor, f"{name} (sha256 {_sha256(path)[:16]})")


def _find(name: str, file_name: str, url: str, sha256: str, given: str | Path | None) -> Path:
    """Return the path of a weights file: the one given, the cached one, or the download."""
    path = Path(given or Path(torch.hub.get_dir(), "checkpoints", file_name))
    if path.is_file():
        return path
    if given is not None:
        raise UserError(f"features '{name}': no file {path}; expected {file_name} of {url}")
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        urllib.request.urlopen(url, timeout=10).close()  # the download itself has no time limit
        logger.info("downloading %s", url)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        raise UserError(
            f"features '{name}': {path} (SHA-256 {sha256}) is missing and cannot be downloaded "
            f"({error}): fetch {url}, give its path as --feature_weights, {HELP}"
        ) from error
    return path


def _as_file(state: dict[str, Tensor]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
