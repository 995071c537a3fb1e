"""The image towers of CLIP (Radford et al., 2021, arXiv:2103.00020) and SigLIP (Zhai et al., 2023,
arXiv:2303.15343), as far as the features of patches that TokenFlow reads (Qu et al., 2024,
arXiv:2412.03069)."""

from functools import partial
from math import isqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.layers.positions import learned_table
from vistok.layers.vit import TransformerBlock
from vistok.models import Component, register_to_config

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageTower(Component):
    """Images in [0, 1] to one feature of `width` channels for each whole patch of `patch_size`.
    `grid` is the number of patches of a side that it was trained on."""

    width: int
    patch_size: int
    grid: int

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        raise NotImplementedError


class CLIPTower(ImageTower):
    """The tower of OpenAI's CLIP without its projection: rows of patches behind the class's, whose
    own feature is dropped. It is given images in [-1, 1], unlike CLIP.

    Args:
        patch_size: pixels of a patch's side.
        width: channels of a row.
        depth: layers.
        num_heads: attention heads.
        grid: positions of a side that the tables have; images of other sizes interpolate them.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        grid: int = 14,
    ):
        super().__init__()
        self.patch_size, self.width, self.grid = patch_size, width, grid
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = learned_table(1 + grid**2, width)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, activation=quick_gelu) for _ in range(depth)
        )
        self.ln_post = nn.LayerNorm(width)
        nn.init.normal_(self.class_embedding, std=width**-0.5)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        x, positions = embedded(self.conv1, 2 * images - 1, self.positional_embedding[1:])
        first = self.class_embedding + self.positional_embedding[0]
        x = self.ln_pre(torch.cat([first.expand(len(x), 1, -1), x + positions], dim=1))
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 1:])


class SigLIPTower(ImageTower):
    """The tower of SigLIP up to the input of its last layer, which is no part of it: what follows
    is neither run nor trained.

    Args:
        patch_size: pixels of a patch's side.
        width: channels of a row.
        depth: layers, without the last of the published model.
        num_heads: attention heads.
        hidden_width: channels inside the MLPs.
        grid: positions of a side that the table has; images of other sizes interpolate it.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 14,
        width: int = 1152,
        depth: int = 26,
        num_heads: int = 16,
        hidden_width: int = 4304,
        grid: int = 27,
    ):
        super().__init__()
        self.patch_size, self.width, self.grid = patch_size, width, grid
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.positional_embedding = learned_table(grid**2, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width,
                num_heads,
                hidden_width=hidden_width,
                norm_eps=1e-6,
                activation=partial(F.gelu, approximate="tanh"),
            )
            for _ in range(depth)
        )

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        # Resized images overshoot; this tower was trained on clamped ones.
        x, positions = embedded(self.conv1, 2 * images.clamp(0, 1) - 1, self.positional_embedding)
        x = x + positions
        for block in self.blocks:
            x = block(x)
        return x


class TimmTower(ImageTower):
    """A network of package timm by its name, such as the ViTamin of TokenFlow-L, without its head.
    It is given images as CLIP's are normalised.

    Args:
        name: of the architecture.
        image_size: pixels of a side.
        patch_size: pixels of a side for which it makes one feature.

    Raises `UserError` where timm is not installed or knows no such network.
    """

    @register_to_config
    def __init__(
        self, name: str = "vitamin_xlarge_256", image_size: int = 256, patch_size: int = 16
    ):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise UserError(f"TimmTower {name}: needs timm; pip install 'vistok[timm]'") from error
        try:
            self.net = timm.create_model(name, img_size=image_size, num_classes=0)
        except RuntimeError as error:
            raise UserError(f"TimmTower: timm knows no network '{name}'") from error
        self.net.fc_norm = nn.Identity()
        self.patch_size, self.width = patch_size, self.net.num_features
        self.grid = image_size // patch_size
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        rows = self.net.forward_features((images - self.mean) / self.std)
        return rows[:, -(self.grid**2) :]  # behind those of classes and registers


def embedded(
    conv: nn.Conv2d, images: Float[Tensor, "b 3 h w"], table: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "n d"]]:
    """Return the rows of patches and of their positions."""
    patches = conv(images)
    return patches.flatten(2).transpose(1, 2), interpolated(table, tuple(patches.shape[-2:]))


def interpolated(table: Float[Tensor, "m d"], size: tuple[int, int]) -> Float[Tensor, "n d"]:
    """Return the positions of a grid of `size`, between those of a square one where it differs."""
    side = isqrt(len(table))
    if size == (side, side):
        return table
    # As the published models do: the factors, a tenth of a position too large, and not the sizes
    # say where samples lie.
    factors = [(positions + 0.1) / side for positions in size]
    grid = table.float().T.unflatten(1, (side, side))[None]
    found = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    return found[0].flatten(1).T.to(table.dtype)


def quick_gelu(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return x * torch.sigmoid(1.702 * x)
