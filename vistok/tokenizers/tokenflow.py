"""TokenFlow (Qu et al., 2024, arXiv:2412.03069): tokens to understand and to draw by. A semantic
and a pixel encoder look at the image, two codebooks with one index quantise what both see, at
rising scales, and two decoders give back a teacher's features and the pixels."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.layers.conv import Decoder, Encoder
from vistok.layers.image_towers import ImageTower, interpolated
from vistok.layers.positions import learned_table
from vistok.layers.vit import TransformerBlock
from vistok.models import register_to_config
from vistok.quantizers import Quantizer
from vistok.tokenizers.base import QuantizedTokenizer, Tokenizer, TokenizerOutput

Part = Literal["both", "semantic", "pixel", "teacher"]


class TokenFlow(QuantizedTokenizer):
    """Images to the codes of a grid, of which each stands for a semantic and for a pixel vector.

    Published are B, of CLIP ViT-B/16 at 224 pixels, read also at 256, and XL, of SigLIP-SO400M at
    384. In stage 1 all of it is trained, the decoded semantic vectors towards a teacher's features,
    which `TokenizerLoss` compares: those that the semantic encoder started from. In stage 2 the
    pixel decoder alone is trained, which may be another, larger one.

    Where the pixel branch, of 2^(levels - 1) pixels a position, does not fit the patches of the
    semantic encoder, its images are resized on the way in and out.

    Args:
        quantizer: of a position's latent: `MultiScale` around `DualVQ` as published, with scales
            that end in the grid of patches.
        semantic_encoder: the image tower that becomes the semantic encoder.
        image_size: pixels of a side. The weights do not depend on it.
        semantic_dim: channels of a latent that are semantic and come first; the rest are the pixel
            encoder's.
        teacher_dim: channels of the teacher's features; None for no semantic decoder, where no
            teacher is aligned with.
        semantic_depth: layers of the semantic decoder.
        semantic_heads: its attention heads.
        channels: width of the pixel encoder's first convolution, and what its multipliers multiply.
        channel_multipliers: width of each level, from full resolution down; each level but the last
            halves the resolution.
        num_res_blocks: residual blocks per level; a decoder has one more.
        decoder_channels: `channels` of the pixel decoder; None for the encoder's.
        decoder_channel_multipliers: its widths; None for the encoder's.
        decoder_res_blocks: its `num_res_blocks`; None for the encoder's.
        z_channels: width between the pixel networks and their projections.
        attention: self-attention at the deepest level and in the middle of the pixel networks.
        pixel_patch_size: side of the squares of pixels that become channels before the first level
            of the pixel networks, to save the work at full resolution; 1 in the published models.
        stage: 1, or 2 to train the pixel decoder alone.
    """

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer,
        semantic_encoder: ImageTower,
        image_size: int = 224,
        semantic_dim: int = 32,
        teacher_dim: int | None = 512,
        semantic_depth: int = 3,
        semantic_heads: int = 12,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        decoder_channels: int | None = None,
        decoder_channel_multipliers: Sequence[int] | None = None,
        decoder_res_blocks: int | None = None,
        z_channels: int = 256,
        attention: bool = True,
        pixel_patch_size: int = 1,
        stage: Literal[1, 2] = 1,
    ):
        super().__init__()
        decoder_multipliers = decoder_channel_multipliers or channel_multipliers
        if len(decoder_multipliers) != len(channel_multipliers):
            raise UserError(
                f"TokenFlow: {len(decoder_multipliers)} decoder_channel_multipliers for "
                f"{len(channel_multipliers)} channel_multipliers: the counts must be equal"
            )
        if quantizer.in_dim != quantizer.dim:
            raise UserError(
                f"TokenFlow: a {type(quantizer).__name__} reads {quantizer.in_dim} channels for "
                f"{quantizer.dim}, which two encoders cannot share out; expected codes of latents"
            )
        if not 0 < semantic_dim < quantizer.dim:
            raise UserError(
                f"TokenFlow: semantic_dim {semantic_dim} must leave some of the quantizer's "
                f"{quantizer.dim} channels to the pixel encoder"
            )
        if stage not in (1, 2):
            raise UserError(f"TokenFlow: stage {stage}; expected 1 or 2")
        tower, self.stage = semantic_encoder, stage
        side = image_size // tower.patch_size
        self.image_size = (image_size, image_size)
        self.pixel_side = side * pixel_patch_size * 2 ** (len(channel_multipliers) - 1)
        self.semantic_dim = semantic_dim
        self.spec = quantizer.spec((side, side))
        self.semantic_encoder = tower
        self.to_semantic = _projection(tower.width, semantic_dim)
        self.encoder = Encoder(
            [channels * m for m in channel_multipliers],
            z_channels, num_res_blocks, attention, 0.0, pixel_patch_size, channels,
        )  # fmt: skip
        self.quant_conv = nn.Conv2d(z_channels, quantizer.dim - semantic_dim, 1)
        self.quantizer = quantizer
        self.semantic_decoder = None
        if teacher_dim is not None:
            self.semantic_decoder = SemanticDecoder(
                semantic_dim, tower.width, semantic_depth, semantic_heads, tower.grid, teacher_dim
            )
        self.post_quant_conv = nn.Conv2d(quantizer.dim - semantic_dim, z_channels, 1)
        self.decoder = Decoder(
            [(decoder_channels or channels) * m for m in decoder_multipliers],
            z_channels, decoder_res_blocks or num_res_blocks, attention, 0.0, pixel_patch_size,
        )  # fmt: skip
        if stage == 2:
            self.requires_grad_(False)
            self.decoder.requires_grad_(True)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], text: Float[Tensor, "b l c"] | None = None
    ) -> TokenizerOutput:
        latents = self._checked_latents(images)
        result = self.quantizer(latents)
        trains_all = self.stage == 1
        taught = trains_all and self.semantic_decoder is not None
        return TokenizerOutput(
            reconstruction=self._reconstructed(result.quantised),
            tokens=result.ids,
            losses=result.losses if trains_all else {},
            usage=result.statistics,
            latents=latents.detach(),
            features=self.to_teacher(result.quantised) if taught else None,
        )

    def to_latents(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b gh gw d"]:
        semantic = self.to_semantic(self.semantic_encoder(images))
        pixel = self.quant_conv(self.encoder(_resized(2 * images - 1, self.pixel_side)))
        pixel = pixel.permute(0, 2, 3, 1)
        return torch.cat([semantic.view(*pixel.shape[:3], -1), pixel], dim=-1)

    def to_images(self, latents: Float[Tensor, "b gh gw d"]) -> Float[Tensor, "b 3 h w"]:
        pixel = latents[..., self.semantic_dim :].permute(0, 3, 1, 2)
        images = self.decoder(self.post_quant_conv(pixel))
        return (_resized(images, self.image_size[0]) + 1) / 2

    def to_teacher(self, latents: Float[Tensor, "b gh gw d"]) -> Float[Tensor, "b gh gw c"]:
        """Return what the semantic decoder makes of quantised latents: features as the teacher's.
        Raises `UserError` for a model without one."""
        if self.semantic_decoder is None:
            raise UserError("TokenFlow: no semantic decoder: it was made with teacher_dim null")
        return self.semantic_decoder(latents[..., : self.semantic_dim].to(self.last_layer.dtype))

    @torch.no_grad()
    def encode_semantic(
        self, images: Float[Tensor, "b 3 h w"], part: Part = "both", scale: int | None = None
    ) -> Float[Tensor, "b gh gw d"]:
        """Return features to understand images by, one at each position of the grid.

        Args:
            images: in [0, 1].
            part: "both", the semantic and pixel channels of the quantised latents, on which the
                published language models were trained; "semantic" or "pixel" for one of them;
                "teacher" for what the semantic decoder makes of the semantic ones.
            scale: None for the sum of all scales, as published; k for what scale k (from 0; -1 is
                the last, a residual) adds to it.
        """
        ids = self.encode(images)
        return self._part(self._added(ids, scale), part)

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b n d"]]:
        """Return features for probes by name: the quantised latents as "tokens", their two parts as
        "semantic" and "pixel", and "teacher" where there is a semantic decoder."""
        latents = self.quantizer.decode(self.encode(images))
        parts = {"tokens": "both", "semantic": "semantic", "pixel": "pixel"}
        if self.semantic_decoder is not None:
            parts["teacher"] = "teacher"
        return {name: self._part(latents, part).flatten(1, 2) for name, part in parts.items()}

    def update_codebook(self, latents: Float[Tensor, "b gh gw d"]) -> None:
        if self.stage == 1:
            self.quantizer.update(latents)

    def start_from(self, other: Tokenizer) -> None:
        """Take over the weights of a trained TokenFlow, in stage 2 without its pixel decoder where
        this one's is of another size."""
        weights = other.state_dict()
        own = {f"decoder.{name}": weight for name, weight in self.decoder.state_dict().items()}
        decoder = {name: w.shape for name, w in weights.items() if name.startswith("decoder.")}
        if self.stage == 2 and decoder != {name: weight.shape for name, weight in own.items()}:
            weights = {name: w for name, w in weights.items() if name not in decoder} | own
        self.take_over(weights, type(other).__name__)

    def at(self, image_size: int, scales: Sequence[int]) -> "TokenFlow":
        """Return the tokenizer with the same weights for images of another size, positions
        interpolated; `scales` are those of its `MultiScale`, which end in the new grid."""
        kind = type(self.quantizer)
        own = kind.revive(self.quantizer.arguments, kind.__name__)
        return self.changed(image_size=image_size, quantizer=kind(**own | {"scales": scales}))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight

    def _added(self, ids: Tensor, scale: int | None) -> Float[Tensor, "b gh gw d"]:
        if scale is None:
            return self.quantizer.decode(ids)
        if not self.spec.is_scales:
            raise UserError(f"TokenFlow: scale {scale} of {self.spec}, which has no scales")
        codes = self.quantizer.codes(ids)
        return self.quantizer.added(codes[scale], scale)

    def _part(self, latents: Float[Tensor, "b gh gw d"], part: Part) -> Float[Tensor, "b gh gw c"]:
        if part == "teacher":
            return self.to_teacher(latents)
        return {
            "both": latents,
            "semantic": latents[..., : self.semantic_dim],
            "pixel": latents[..., self.semantic_dim :],
        }[part]


class SemanticDecoder(nn.Module):
    """A small ViT from semantic vectors to features of a teacher; its positions are interpolated
    for other grids than the square one of `grid` positions a side."""

    def __init__(self, dim: int, width: int, depth: int, num_heads: int, grid: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, width)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = learned_table(1 + grid**2, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, norm_eps=1e-6) for _ in range(depth)
        )
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.head = _projection(width, out_dim)

    def forward(self, latents: Float[Tensor, "b gh gw d"]) -> Float[Tensor, "b gh gw c"]:
        grid = tuple(latents.shape[1:3])
        first = self.class_embedding + self.positional_embedding[0]
        x = self.proj(latents.flatten(1, 2)) + interpolated(self.positional_embedding[1:], grid)
        x = torch.cat([first.expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_post(x[:, 1:])).unflatten(1, grid)


def _projection(width: int, out_dim: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out_dim))
    for layer in (layers[0], layers[2]):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return layers


def _resized(images: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 h2 w2"]:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bicubic")
