"""Transformers over [patches of a latent map | registers], FlexTok's two networks (Bachmann et al.,
2025, arXiv:2502.13967, section 3): registers read the image in the encoder, and in the decoder tell
a flow what to draw.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.layers.adaln import ModulatedBlock, zero_linear
from vistok.layers.patches import from_patches, to_patches
from vistok.layers.positions import sincos_grid, time_features
from vistok.layers.transformer import Block

MaskMode = Literal["causal_last", "full", "causal"]
TAP = 1  # block whose patch rows are compared with a teacher's features (REPA)


class PatchEmbedding(nn.Module):
    """Squares of a map as rows that know their place. Maps smaller than `grid` squares have the
    places of its upper left corner."""

    def __init__(self, channels: int, patch_size: int, width: int, grid: tuple[int, int]):
        super().__init__()
        if width % 4:
            raise UserError(f"width {width} must be a multiple of 4, for sines and cosines")
        self.patch_size = patch_size
        self.proj = nn.Linear(channels * patch_size**2, width)
        self.register_buffer("positions", sincos_grid(*grid, width))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        height, width = self.grid_of(x)
        positions = self.positions[:height, :width].flatten(0, 1)
        return self.proj(to_patches(x, self.patch_size).to(self.proj.weight.dtype)) + positions

    def grid_of(self, x: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Return the squares of a column and a row; raise `UserError` if they have no place."""
        (height, width), size = x.shape[2:], self.patch_size
        high, wide = self.positions.shape[:2]
        if height % size or width % size or height > high * size or width > wide * size:
            raise UserError(
                f"a map of {height}x{width}: expected multiples of {size} up to "
                f"{high * size}x{wide * size}"
            )
        return height // size, width // size


class RegisterEncoder(nn.Module):
    """A latent map to one vector for each register.

    `mask_mode` says what rows see: with `causal_last` patches see the patches, and a register these
    and the registers up to itself; with `causal` each row sees those up to itself, patches first;
    with `full` all see all.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        num_registers: int,
        width: int,
        depth: int,
        num_heads: int,
        grid: tuple[int, int],
        patch_size: int,
        mlp_ratio: float,
        mask_mode: MaskMode,
    ):
        super().__init__()
        self.mask_mode = mask_mode
        self.patches = PatchEmbedding(channels, patch_size, width, grid)
        self.registers = _trained_rows(num_registers, width)
        arguments = block_arguments(width, num_heads, mlp_ratio)
        self.blocks = nn.ModuleList(Block(**arguments) for _ in range(depth))
        self.norm = _layer_norm(width)
        self.head = zero_linear(width, dim)
        _initialise(self.patches, self.blocks)

    def forward(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k d"]:
        patches = self.patches(latents)
        x = torch.cat([patches, self.registers.expand(len(patches), -1, -1)], dim=1)
        mask = None
        if self.mask_mode == "causal_last":
            row = torch.arange(x.shape[1], device=x.device)
            mask = (row < patches.shape[1]) | (row <= row[:, None])
        for block in self.blocks:
            x = block(x, mask=mask, is_causal=self.mask_mode == "causal")
        return self.head(self.norm(x[:, patches.shape[1] :]))


@dataclass(frozen=True)
class Slots:
    """Rows that stand for the decoder's registers, the last for `copies` of them, all alike."""

    rows: Float[Tensor, "b s d"]
    copies: int = 1


class FlowDecoder(nn.Module):
    """The velocity of a noised latent map, given what the registers hold.

    A register that is not kept holds the mask vector, without a place, and in the null condition
    all hold the null vector. Equal rows stay equal in every layer, so that n of them act as one
    row whose key counts n times: its logit is raised by log n.

    Args:
        channels: of the map.
        dim: channels of a code.
        num_registers: registers of a sample.
        width, depth, num_heads: of the transformer.
        grid: squares of the largest map, high and wide.
        patch_size: side of a square.
        mlp_ratio: width of the feed-forward layers, of which gates leave two thirds.
        kinds: 2 if patches and registers are modulated in different ways, 1 if in the same.
        time_dim: sines and cosines of the time.
        learned_null: whether the null vector is learned or zero.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        num_registers: int,
        width: int,
        depth: int,
        num_heads: int,
        grid: tuple[int, int],
        patch_size: int,
        mlp_ratio: float,
        kinds: int,
        time_dim: int,
        learned_null: bool,
    ):
        super().__init__()
        self.time_dim = time_dim
        self.codes = nn.Linear(dim, width)
        self.positions = _trained_rows(num_registers, width)
        self.mask_vector = _trained_rows(width)
        if learned_null:
            self.null_vector = _trained_rows(width)
        else:
            self.register_buffer("null_vector", torch.zeros(width), persistent=False)
        self.patches = PatchEmbedding(channels, patch_size, width, grid)
        self.time = nn.Sequential(nn.Linear(time_dim, width), nn.SiLU(), nn.Linear(width, width))
        arguments = block_arguments(width, num_heads, mlp_ratio)
        self.blocks = nn.ModuleList(ModulatedBlock(**arguments, kinds=kinds) for _ in range(depth))
        self.norm = _layer_norm(width)
        self.head_modulation = zero_linear(width, 2 * width)
        self.head = zero_linear(width, channels * patch_size**2)
        _initialise(self.codes, self.patches, self.time)
        for block in self.blocks:
            _initialise(block.attention, block.feed_forward)

    def slots(
        self, codes: Float[Tensor, "b k d"], kept: Bool[Tensor, "b k"] | None = None
    ) -> Slots:
        """Return the registers that hold the first k codes, of which `kept` marks those that count,
        if not all do."""
        rows = self.codes(codes.to(self.codes.weight.dtype)) + self.positions[: codes.shape[1]]
        if kept is not None:
            rows = torch.where(kept[..., None], rows, self.mask_vector.to(rows.dtype))
        dropped = len(self.positions) - rows.shape[1]
        if dropped == 0:
            return Slots(rows)
        masked = self.mask_vector.to(rows.dtype).expand(len(rows), 1, -1)
        return Slots(torch.cat([rows, masked], dim=1), dropped)

    def null_slots(self, batch: int) -> Slots:
        """Return the registers of the null condition."""
        return Slots(self.null_vector.expand(batch, 1, -1), len(self.positions))

    def drop(self, slots: Slots, dropped: Bool[Tensor, "b"]) -> Slots:
        """Return the slots, in the null condition for some of the samples."""
        null = self.null_vector.to(slots.rows.dtype)
        return Slots(torch.where(dropped[:, None, None], null, slots.rows), slots.copies)

    def modulations(self, times: Float[Tensor, "b"]) -> list[Float[Tensor, "b ..."]]:
        """Return how `times` modulate each block, and last the head. They depend on nothing else,
        so that sampling computes those of all its steps once."""
        features = time_features(times, self.time_dim).to(self.head.weight.dtype)
        condition = self.time(features)
        head = self.head_modulation(nn.functional.silu(condition)).unflatten(-1, (2, -1))
        return [*(block.modulate(condition) for block in self.blocks), head]

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        slots: Slots,
        modulations: list[Float[Tensor, "_ ..."]],
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b gh gw d"]]:
        """Return the velocity, and the patches' hidden states after the second block."""
        grid = self.patches.grid_of(x)
        patches = self.patches(x)
        num_patches = patches.shape[1]
        x = torch.cat([patches, slots.rows.to(patches.dtype)], dim=1)
        mask = None
        if slots.copies > 1:
            mask = x.new_zeros(x.shape[1])
            mask[-1] = math.log(slots.copies)
            mask = mask.expand(x.shape[1], -1)
        features = x
        for index, block in enumerate(self.blocks):
            x = block(x, modulations[index], num_patches, mask=mask)
            features = x if index <= TAP else features
        shift, scale = modulations[-1][:, :, None].unbind(1)
        rows = self.head(self.norm(x[:, :num_patches]) * (1 + scale) + shift)
        velocity = from_patches(rows, grid, self.patches.patch_size)
        return velocity, features[:, :num_patches].unflatten(1, grid)


def block_arguments(width: int, num_heads: int, mlp_ratio: float) -> dict:
    """Return what all blocks share: norms without parameters, of queries and keys, too, and a scale
    of 8 over the head's width, which is the usual one for heads of 64 channels alone."""
    if width % num_heads:
        raise UserError(f"width {width} must be a multiple of {num_heads} heads")
    return {
        "dim": width,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "hidden_dim": int(2 * int(mlp_ratio * width) / 3),
        "dropout": 0.0,
        "norm": _layer_norm,
        "qk_norm": _layer_norm,
        "scale": 8 * num_heads / width,
    }


_layer_norm = partial(nn.LayerNorm, eps=1e-5, elementwise_affine=False)


def _trained_rows(*shape: int) -> nn.Parameter:
    rows = nn.Parameter(torch.empty(shape))
    nn.init.trunc_normal_(rows, std=0.02)
    return rows


def _initialise(*modules: nn.Module) -> None:
    """Xavier-uniform weights, biases zero."""
    for module in modules:
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
