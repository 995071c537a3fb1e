"""Alignment with a frozen vision transformer (REPA: Yu et al., 2024, arXiv:2410.06940): features
inside a tokenizer, as it projects them, are to point where the teacher's do."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError

Layer = Literal["last", "penultimate", "projected"]


class Teacher(nn.Module):
    """Patch features of a vision transformer from transformers, or of timm's in its wrapper, such
    as DINOv2, or of the image tower of a CLIP or SigLIP. Frozen, in float32.

    Args:
        path: directory or Hub repository, as transformers saves it, with its image processor.
        image_size: pixels of a side to which images are brought; None for what the image processor
            names.
        layer: where features are read: "last" for the network's result, "penultimate" for the input
            of its last layer (TokenFlow's of SigLIP), "projected" for the result of a CLIP,
            normalised and projected to the space of captions (TokenFlow's of CLIP).

    Attributes: `grid`, patches of a side; `dim`, channels of a patch. Raises `UserError` where
    transformers is not installed or `path` holds no such model.
    """

    def __init__(self, path: str, image_size: int | None = None, layer: Layer = "last"):
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise UserError(
                f"teacher {path}: needs transformers; pip install 'vistok[text]'"
            ) from error
        self.path, self.layer = path, layer
        try:
            whole, loading = transformers.AutoModel.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
            processor = transformers.AutoImageProcessor.from_pretrained(path).to_dict()
        except Exception as error:  # each model's own code may fail in its own way
            raise self._unfit(error) from error
        self.net = getattr(whole, "vision_model", whole)
        self.projection = None
        if layer == "projected":
            self.projection = getattr(whole, "visual_projection", None)
            if self.projection is None:
                raise self._unfit(f"a {type(whole).__name__} projects no features of images")
        self.requires_grad_(False)
        self.eval()
        # Features are read below the pooler, which checkpoints of classifiers lack.
        missing = sorted(k for k in loading["missing_keys"] if not k.startswith("pooler"))
        if missing:
            raise self._unfit(f"{len(missing)} tensor(s) are missing, as {missing[0]}")
        patch = _patch_size(self.net)
        if self.net.main_input_name != "pixel_values" or patch is None:
            raise self._unfit(f"a {type(self.net).__name__} takes no patches of images")
        side, mean, std = _preprocessing(processor)
        self.image_size = image_size or side
        # A published size may leave a margin, as the 384 pixels of SigLIP's patches of 14 do.
        if not self.image_size or (self.image_size % patch and self.image_size != side):
            raise self._unfit(
                f"image_size {self.image_size} is no multiple of its patches of {patch}"
            )
        self.grid = self.image_size // patch
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        parameters = inspect.signature(self.net.forward).parameters
        name = "interpolate_pos_encoding"
        self.options = {name: True} if name in parameters else {}
        try:
            features = self(torch.zeros(1, 3, self.image_size, self.image_size))
        except (ValueError, AssertionError, RuntimeError) as error:
            raise self._unfit(error) from error
        self.dim = features.shape[-1]

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b gh gw d"]:
        """Return the features of the patches of [0, 1] images, brought to one size as a whole;
        class and register tokens, which come before, are dropped."""
        with torch.autocast(images.device.type, enabled=False):
            size = (self.image_size, self.image_size)
            resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
            normalised = (resized - self.mean) / self.std
            tokens = self._tokens(normalised)
        patches = self.grid**2
        if tokens.ndim != 3 or tokens.shape[1] < patches:
            raise self._unfit(
                f"it makes {tuple(tokens.shape)} of {self.grid}x{self.grid} patches, not one "
                "feature of each"
            )
        return tokens[:, -patches:].unflatten(1, (self.grid, self.grid))

    def _tokens(self, normalised: Float[Tensor, "b 3 h w"]) -> Tensor:
        if self.layer == "penultimate":
            asked = self.options | {"output_hidden_states": True}
            return self.net(pixel_values=normalised, **asked).hidden_states[-2]
        tokens = self.net(pixel_values=normalised, **self.options).last_hidden_state
        if self.projection is None:
            return tokens
        return self.projection(self.net.post_layernorm(tokens))

    def _unfit(self, reason: Exception | str) -> UserError:
        if isinstance(reason, UserError):
            return reason
        line = next((line for line in str(reason).splitlines() if line.strip()), "")
        return UserError(
            f"teacher {self.path}: no readable vision transformer ({line.strip()}); expected a "
            "directory or Hub repository such as facebook/dinov2-base"
        )


def alignment(
    features: Float[Tensor, "b h w d"],
    taught: Float[Tensor, "b gh gw d"],
    grid: int | None = None,
) -> Float[Tensor, "b"]:
    """Return the negative mean cosine similarity of each image's features and the teacher's, both
    interpolated to `grid` x `grid` positions, by default the teacher's."""
    size = (grid, grid) if grid else tuple(taught.shape[1:3])
    ours, theirs = (
        F.interpolate(f.float().movedim(-1, 1), size, mode="bilinear") for f in (features, taught)
    )
    return -F.cosine_similarity(ours, theirs, dim=1).mean((1, 2))


def _patch_size(net: nn.Module) -> int | None:
    """Return the pixels of a patch's side, None for a network without patches."""
    embedding = getattr(getattr(net, "timm_model", None), "patch_embed", net.config)
    size = getattr(embedding, "patch_size", None)
    return size if isinstance(size, int | None) else size[0]


def _preprocessing(
    processor: dict[str, Any],
) -> tuple[int | None, Sequence[float], Sequence[float]]:
    """Return side, mean and deviation of the images that a model was trained on."""
    if "data_config" in processor:  # timm's
        data = processor["data_config"]
        return data["input_size"][-1], data["mean"], data["std"]
    size = processor["crop_size" if processor.get("do_center_crop") else "size"]
    side = size.get("height") or size.get("shortest_edge")
    if not processor.get("do_normalize", True):
        return side, [0.0] * 3, [1.0] * 3
    return side, processor["image_mean"], processor["image_std"]
