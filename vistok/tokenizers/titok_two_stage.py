"""TiTok as first published (Yu et al., 2024, arXiv:2406.07550, section 3.3): it learns to predict
the codes of a VQGAN, and then to decode pixels by that VQGAN's decoder. One-D-Piece (Miwa et al.,
2025, arXiv:2501.10064) is the same with `tail_drop`."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.models import register_to_config
from vistok.quantizers import VQ, Quantizer
from vistok.tokenizers.base import Tokenizer, TokenizerOutput
from vistok.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vistok.tokenizers.sequence import Lengths
from vistok.tokenizers.titok import TiTok, initialise


class TwoStageTiTok(TiTok):
    """A TiTok whose decoder predicts, per patch, the code of a `MaskGITVQGAN`, its proxy code.

    In stage 1 the VQGAN is frozen: the loss is the cross-entropy of its codes of the same images,
    and decoding takes the likeliest ones. In stage 2, encoder and quantizer are frozen: the
    expectation of the VQGAN's codebook under the predicted distribution goes through its decoder,
    and both are trained on pixels with the rest. A stage starts from what it builds on by
    `start_from`.

    Args:
        quantizer: the codes of a latent token.
        stage: 1 or 2.
        num_proxy_codes: codes of the VQGAN.
        vqgan_channels: its `channels`; None for a model of stage 1 without VQGAN, which encodes and
            predicts but neither decodes nor trains.
        vqgan_channel_multipliers: its widths.
        vqgan_res_blocks: its residual blocks per level.
        vqgan_dim: channels of its codes.
        titok: arguments of `TiTok`.
    """

    settled = ("stem_channels", "stem_blocks")

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer,
        stage: Literal[1, 2] = 1,
        num_proxy_codes: int = 1024,
        vqgan_channels: int | None = 128,
        vqgan_channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        vqgan_res_blocks: int = 2,
        vqgan_dim: int = 256,
        **titok,
    ):
        super().__init__(quantizer, stem_channels=None, stem_blocks=0, **titok)
        if stage not in (1, 2) or (stage == 2 and vqgan_channels is None):
            raise UserError(
                f"TwoStageTiTok: stage {stage} with vqgan_channels {vqgan_channels}; expected "
                "stage 1, or stage 2 with a VQGAN"
            )
        self.stage = stage
        self.decoder.head = ProxyHead(self.decoder.ln_post.weight.numel(), num_proxy_codes)
        self.decoder.head.apply(initialise)
        self.vqgan = None
        if vqgan_channels is not None:
            self.vqgan = MaskGITVQGAN(
                VQ(num_proxy_codes, vqgan_dim, l2_normalise=False),
                self.image_size,
                vqgan_channels,
                vqgan_channel_multipliers,
                vqgan_res_blocks,
            )
            codes, patches = self.vqgan.spec.num_tokens, self.decoder.num_patches
            if codes != patches:
                raise UserError(
                    f"TwoStageTiTok: {patches} patches of the decoder for {codes} codes of the "
                    f"VQGAN: decoder_patch_size must be {2 ** (len(vqgan_channel_multipliers) - 1)}"
                )
        if stage == 1 and self.vqgan is not None:
            self.vqgan.requires_grad_(False)
        if stage == 2:
            self.vqgan.encoder = None  # it made the targets of stage 1
            for part in (self.latent_tokens, self.encoder, self.quantizer):
                part.requires_grad_(False)

    def to_latents(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k d"]:
        rows = self.encoder(images, self.latent_tokens)
        # Published weights read the memory of these (k, width) rows as if it were (width, k).
        mixed = rows.contiguous().view(len(rows), -1, rows.shape[1]).transpose(1, 2)
        return self.encoder.proj_out(mixed)

    def proxy_logits(
        self,
        latents: Float[Tensor, "b k d"],
        kept: Bool[Tensor, "b k"] | None = None,
        text: Float[Tensor, "b l c"] | None = None,
    ) -> Float[Tensor, "b codes gh gw"]:
        """Return the logits of each patch's proxy code, from arguments as of `to_images`."""
        return self.decoder(latents, kept, text)

    @torch.no_grad()
    def proxy_codes(self, images: Float[Tensor, "b 3 h w"]) -> Int64[Tensor, "b gh gw"]:
        """Return the codes that stage 1 learns to predict."""
        return self._vqgan().encode(images)

    def to_images(
        self,
        latents: Float[Tensor, "b k d"],
        kept: Bool[Tensor, "b k"] | None = None,
        text: Float[Tensor, "b l c"] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        vqgan = self._vqgan()
        logits = self.proxy_logits(latents, kept, text)
        if self.stage == 1:
            features = vqgan.quantizer.decode(logits.argmax(1)).to(latents.dtype)
        else:
            probabilities = logits.permute(0, 2, 3, 1).softmax(-1)
            features = probabilities @ vqgan.quantizer.embedding.weight
        return vqgan.to_images(features)

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        text: Float[Tensor, "b l c"] | None = None,
        lengths: Lengths | None = None,
    ) -> TokenizerOutput:
        output = super().forward(images, text, lengths)
        if self.stage == 2:
            output.losses = {}  # of a quantizer that no longer moves
        return output

    def compared(
        self,
        images: Float[Tensor, "b 3 h w"],
        latents: Float[Tensor, "b k d"],
        kept: Bool[Tensor, "b k"] | None,
        text: Float[Tensor, "b l c"] | None,
    ) -> tuple[Float[Tensor, "b 3 h w"] | None, dict[str, Tensor]]:
        if self.stage == 2:
            return super().compared(images, latents, kept, text)
        codes = self.proxy_codes(images)
        logits = self.proxy_logits(latents.to(self.last_layer.dtype), kept, text)
        return None, {"proxy": F.cross_entropy(logits.float(), codes)}

    def update_codebook(self, latents: Float[Tensor, "*positions d"]) -> None:
        if self.stage == 1:
            super().update_codebook(latents)

    def start_from(self, other: Tokenizer) -> None:
        """Stage 1 takes the VQGAN from a `MaskGITVQGAN`; stage 2 takes everything but the VQGAN's
        encoder from stage 1. Either also goes on from a model of its own kind."""
        if self.stage == 1 and isinstance(other, MaskGITVQGAN):
            # How often its codes were used lately mattered to its training alone.
            self._vqgan().take_over(_without(other, "quantizer.embed_prob"), "MaskGITVQGAN")
        elif self.stage == 2 and isinstance(other, TwoStageTiTok) and other.stage == 1:
            self.take_over(_without(other, "vqgan.encoder."), "TwoStageTiTok of stage 1")
        else:
            super().start_from(other)

    @property
    def last_layer(self) -> nn.Parameter:
        return super().last_layer if self.stage == 1 else self.vqgan.last_layer

    def _vqgan(self) -> MaskGITVQGAN:
        if self.vqgan is None:
            raise UserError(
                "TwoStageTiTok of stage 1 has no VQGAN (vqgan_channels None), which decoding and "
                "training need: import it with the option vqgan"
            )
        return self.vqgan


def _without(model: Tokenizer, prefix: str) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith(prefix)}


class ProxyHead(nn.Module):
    """Maps each feature to the logits of a code."""

    def __init__(self, width: int, num_codes: int):
        super().__init__()
        self.proj = nn.Conv2d(width, 2 * width, 1)
        self.conv_out = nn.Conv2d(2 * width, num_codes, 1)

    def forward(self, features: Float[Tensor, "b w gh gw"]) -> Float[Tensor, "b codes gh gw"]:
        return self.conv_out(self.proj(features).tanh())
