"""Feature networks: the random one says what a score needs, the published ones are read safely."""

import hashlib
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import ImageFilter
from torch import nn
from torch_fidelity import feature_extractor_clip as clip

from vistok.data import Emoji, Transform, to_uint8
from vistok.errors import UserError
from vistok.metrics import Moments, frechet_distance, load_features
from vistok.metrics.features import RandomInception, _find


def test_random_features_are_the_same_everywhere():
    before = torch.get_rng_state()
    network = load_features("random")
    assert torch.equal(torch.get_rng_state(), before)
    pixels = torch.randint(256, (3, 3, 20, 20)).to(torch.uint8)
    features = network(pixels)
    assert features.vectors.shape == (3, network.dim)
    assert features.logits.shape == (3, network.num_logits)
    assert "not comparable" in network.label
    torch.manual_seed(7)
    assert torch.equal(load_features("random")(pixels).vectors, features.vectors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(pixels).vectors, features.vectors)


def test_random_features_order_pictures_by_quality():
    """Real pictures are nearer to others than to blurred ones, and those nearer than noise."""
    emoji, crop, network = (
        Emoji("train"),
        Transform("resize-center-crop", 32),
        load_features("random"),
    )
    order = torch.randperm(len(emoji))[:120].tolist()

    def pictures(indices: list[int], blur: float = 0) -> torch.Tensor:
        images = [emoji[i].image.filter(ImageFilter.GaussianBlur(blur)) for i in indices]
        return torch.stack([to_uint8(crop(image)) for image in images])

    def moments(pixels: torch.Tensor) -> Moments:
        result = Moments(network.dim)
        result.update(network(pixels).vectors)
        return result

    def distance(a: Moments, b: Moments) -> float:
        return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

    real = moments(pictures(order[:60]))
    others = distance(real, moments(pictures(order[60:])))
    blurred = distance(real, moments(pictures(order[60:], blur=2.5)))
    noise = distance(real, moments(torch.randint(256, (60, 3, 32, 32)).to(torch.uint8)))
    assert 4 * others < blurred
    assert 1.5 * blurred < noise


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """A file that fits the Inception of FID, as no published one is at hand."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(RandomInception(seed=3).state_dict(), path)
    return path


def test_inception_is_read_from_a_local_file(inception_file):
    network = load_features("inception", inception_file)
    assert (network.dim, network.num_logits) == (2048, 1008)
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert network.label == f"inception-v3-compat (sha256 {digest[:16]})"
    expected = torch.load(inception_file, weights_only=True)
    for name, tensor in network.extractor.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_the_cache_comes_before_the_network(inception_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.symlink_to(inception_file)
    assert load_features("inception").dim == 2048


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_missing_and_broken_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    expected = r"6726825d\.pth \(SHA-256 6726825d\.\.\.\) is missing.*--feature_weights.*random"
    with pytest.raises(UserError, match=expected):
        load_features("inception")
    with pytest.raises(UserError, match=r"no file nowhere.pth"):
        load_features("inception", "nowhere.pth")
    for content in (b"", b"text", pickle.dumps(Payload())):
        Path("broken.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.pth does not hold"):
            load_features("inception", "broken.pth")
    torch.save({"conv.weight": torch.zeros(1)}, "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not hold"):
        load_features("inception", "other.pth")
    assert not Path("executed").exists()
    with pytest.raises(UserError, match="did you mean 'inception'"):
        load_features("incepton")
    with pytest.raises(UserError, match="take no weights"):
        load_features("random", "other.pth")


def test_a_failing_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("vistok.metrics.features.constants.HF_HUB_OFFLINE", False)

    def refuse(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match=r"no route.*fetch https://example"):
        _find("inception", "w.pth", "https://example/w.pth", "abc", None)
    assert list(tmp_path.iterdir()) == []


class TinyCLIP(nn.Module):
    """A CLIP of two layers with the names that torch-fidelity looks for."""

    def __init__(self):
        super().__init__()
        self.visual = clip.CLIPVisual(8, 28, 2, 64, 14).visual
        self.text_projection = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x):
        return x


def test_clip_is_opened_if_it_is_the_published_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "clip.pt"
    torch.jit.trace(TinyCLIP(), torch.zeros(1)).save(path)
    with pytest.raises(UserError, match=r"clip\.pt has another SHA-256 than 40d365715913"):
        load_features("clip-vit-b-32", path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(clip.MODEL_METADATA["clip-vit-b-32"], "hash", digest)
    network = load_features("clip-vit-b-32", path)
    assert (network.dim, network.num_logits) == (8, 0)
    assert digest[:16] in network.label


def test_dinov2_comes_from_a_hub_directory(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"facebookresearch_dinov2_main.*is missing"):
        load_features("dinov2-vit-s-14", tmp_path)
    code = tmp_path / "facebookresearch_dinov2_main" / "hubconf.py"
    code.parent.mkdir()
    code.write_text(
        "from torch import nn\n"
        "def dinov2_vits14(): return nn.Sequential(nn.AvgPool2d(112), nn.Flatten())\n"
    )
    with pytest.raises(UserError, match=r"dinov2_vits14_pretrain\.pth is missing"):
        load_features("dinov2-vit-s-14", tmp_path)
    weights = tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")

    def refuse(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    before = torch.hub.get_dir()
    network = load_features("dinov2-vit-s-14", tmp_path)
    assert network.dim == 12
    assert hashlib.sha256(b"weights").hexdigest()[:16] in network.label
    assert torch.hub.get_dir() == before
