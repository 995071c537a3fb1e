"""FlexTok (Bachmann et al., 2025, arXiv:2502.13967): images as ordered sequences of any length.

Registers read the latents of a frozen autoencoder, each only what those before it left over, and
become codes; a flow in the same latents draws the image from as many of the first as there are.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.decoding.flow import FlowSampler, Guidance
from vistok.decoding.noise import Noise
from vistok.decoding.schedules import Schedule
from vistok.errors import UserError
from vistok.layers.adaln import zero_linear
from vistok.layers.registers import FlowDecoder, MaskMode, RegisterEncoder
from vistok.losses.flow import FlowTimes, flow_loss, noised
from vistok.models import register_to_config
from vistok.quantizers import Quantizer
from vistok.tokenizers.base import QuantizedTokenizer, Tokenizer, TokenizerOutput
from vistok.tokenizers.kl import KLAutoencoder, KLTokenizer
from vistok.tokenizers.sequence import Lengths, TailDrop, kept_of


class FlexTok(QuantizedTokenizer):
    """Images to `num_tokens` codes, the first of which say most.

    The published sizes (width, depth, heads) are d12 768, 12, 12; d18 1152, 18, 18; d28 1792, 28,
    28. Without `vae` the model maps latents to tokens and back, see `encode_latents` and
    `decode_latents`, which take maps of any size up to that of the model. Maps of different sizes
    go in different calls: a sample never sees another.

    Args:
        quantizer: the codes of a register.
        vae: the autoencoder, which is not trained; see `start_from`.
        image_size: pixels of a side, or (height, width); without `vae`, of the latents.
        latent_channels: of the autoencoder's latents.
        num_tokens: registers of an image.
        patch_size: side of the squares of latents that are one row of the transformers.
        encoder_width: width of the encoder's transformer.
        encoder_depth: its blocks.
        encoder_heads: its attention heads.
        encoder_mlp_ratio: width of its feed-forward layers over that of the transformer, of which
            gates leave two thirds.
        decoder_width: width of the decoder's transformer.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        decoder_mlp_ratio: as of the encoder.
        encoder_mask: what the rows of the encoder see; see `RegisterEncoder`.
        modulation: whether times modulate patches and registers of the decoder `apart` or `alike`.
        time_dim: sines and cosines of the time.
        null_condition: what the registers hold in the null condition of guidance.
        tail_drop: how many tokens training keeps; see `TailDrop`.
        condition_dropout: probability with which training replaces all tokens by the null
            condition.
        flow_times: density of the times of training; see `FlowTimes`.
        alignment_dim: channels of a teacher's features, which a small network predicts from the
            decoder's second block (REPA: Yu et al., 2024, arXiv:2410.06940); None for none.
        steps: of the flow, in decoding.
        guidance: scale along the flow, as a number or a `Schedule`.
        guidance_momentum: see `Guidance`.
        guidance_threshold: see `Guidance`.
        guidance_parallel: see `Guidance`.
    """

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer,
        vae: KLAutoencoder | None = None,
        image_size: int | Sequence[int] = 256,
        latent_channels: int = 16,
        num_tokens: int = 256,
        patch_size: int = 2,
        encoder_width: int = 1152,
        encoder_depth: int = 18,
        encoder_heads: int = 18,
        encoder_mlp_ratio: float = 4.0,
        decoder_width: int = 1152,
        decoder_depth: int = 18,
        decoder_heads: int = 18,
        decoder_mlp_ratio: float = 4.0,
        encoder_mask: MaskMode = "causal_last",
        modulation: Literal["apart", "alike"] = "apart",
        time_dim: int = 256,
        null_condition: Literal["learned", "zero"] = "learned",
        tail_drop: str = "uniform(sample)",
        condition_dropout: float = 0.2,
        flow_times: str = "logit_normal",
        alignment_dim: int | None = None,
        steps: int = 25,
        guidance: float | str = 7.5,
        guidance_momentum: float = -0.5,
        guidance_threshold: float | None = 2.5,
        guidance_parallel: float = 0.0,
    ):
        super().__init__()
        if vae is not None and vae.latent_channels != latent_channels:
            raise UserError(
                f"FlexTok: latent_channels {latent_channels} must be the {vae.latent_channels} of "
                "the vae"
            )
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.factor = 1 if vae is None else vae.factor
        side = self.factor * patch_size
        if height % side or width % side:
            raise UserError(
                f"FlexTok: image_size {height}x{width} must be divisible by {side}, the side of a "
                f"patch of {patch_size} latents"
            )
        self.image_size = (height, width)
        self.latent_channels = latent_channels
        self.spec = quantizer.spec((num_tokens,), ordered=True)
        shared = {
            "channels": latent_channels,
            "num_registers": num_tokens,
            "grid": (height // side, width // side),
            "patch_size": patch_size,
        }
        self.encoder = RegisterEncoder(
            dim=quantizer.in_dim,
            width=encoder_width,
            depth=encoder_depth,
            num_heads=encoder_heads,
            mlp_ratio=encoder_mlp_ratio,
            mask_mode=encoder_mask,
            **shared,
        )
        self.quantizer = quantizer
        self.decoder = FlowDecoder(
            dim=quantizer.dim,
            width=decoder_width,
            depth=decoder_depth,
            num_heads=decoder_heads,
            mlp_ratio=decoder_mlp_ratio,
            kinds=2 if modulation == "apart" else 1,
            time_dim=time_dim,
            learned_null=null_condition == "learned",
            **shared,
        )
        self.projection = alignment_dim and _projection(decoder_width, alignment_dim)
        self.tail_drop = TailDrop(tail_drop, num_tokens)
        self.condition_dropout = condition_dropout
        self.flow_times = FlowTimes(flow_times)
        self.sampler = FlowSampler(
            steps,
            Schedule(guidance),
            Guidance(guidance_momentum, guidance_threshold, guidance_parallel),
        )
        self.vae = vae and vae.requires_grad_(False)

    def to_latents(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k d"]:
        return self.encoder(self.vae.encode(images))

    def encode_latents(self, latents: Float[Tensor, "b c h w"]) -> Tensor:
        """Return the tokens of an autoencoder's scaled latents."""
        return self.quantizer.encode(self.encoder(latents))

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        lengths: Int64[Tensor, "b"] | None = None,
        text: Float[Tensor, "b l c"] | None = None,
        noise: Noise | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        self.check_vae()
        latents = self.decode_latents(tokens, lengths, noise)
        return self.vae.decode(latents).float().clamp(0, 1)

    @torch.no_grad()
    def decode_latents(
        self,
        tokens: Tensor,
        lengths: Int64[Tensor, "b"] | None = None,
        noise: Noise | None = None,
        size: tuple[int, int] | None = None,
        sampler: FlowSampler | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return scaled latents, `size` high and wide (by default those of the model's images), to
        which the flow leads from `noise`; `sampler` stands in for the model's own."""
        self.check_tokens(tokens, lengths)
        sampler = sampler or self.sampler
        noise = noise or Noise(0, range(len(tokens)))
        size = size or tuple(side // self.factor for side in self.image_size)
        start = noise.normal(self.latent_channels, *size).to(self.device)
        codes = self.quantizer.decode(tokens)
        slots = self.decoder.slots(codes, kept_of(codes, lengths))
        null = self.decoder.null_slots(len(tokens))
        modulations = self.decoder.modulations(sampler.times.to(self.device))

        def velocity(x: Tensor, step: int, slots=slots) -> Tensor:
            now = [numbers[step : step + 1] for numbers in modulations]
            return self.decoder(x, slots, now)[0].float()

        return sampler(start, velocity, lambda x, step: velocity(x, step, null))

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        text: Float[Tensor, "b l c"] | None = None,
        lengths: Lengths | None = None,
    ) -> TokenizerOutput:
        """One step of flow matching, without a reconstruction. `lengths` are the tokens to keep; by
        default those that `tail_drop` draws in training."""
        self.check_images(images)
        batch, device = len(images), images.device
        data = self.vae.encode(images)
        latents = self.encoder(data)
        result = self.quantizer(latents)
        codes, share = result.quantised, None
        if lengths is None and self.training:
            lengths = self.tail_drop.draw(batch, device)
        if lengths is not None:
            share = torch.as_tensor(lengths, device=device) / codes.shape[1]
        if isinstance(lengths, int):
            codes, lengths = codes[:, :lengths], None
        slots = self.decoder.slots(codes, kept_of(codes, lengths))
        if self.training:
            dropped = torch.rand(batch, device=device) < self.condition_dropout
            slots = self.decoder.drop(slots, dropped)
        times, noise = self.flow_times.draw(batch, device), torch.randn_like(data)
        modulations = self.decoder.modulations(times)
        velocity, features = self.decoder(noised(data, noise, times), slots, modulations)
        return TokenizerOutput(
            reconstruction=None,
            tokens=result.ids,
            losses={**result.losses, "flow": flow_loss(velocity, data, noise).mean()},
            usage=result.statistics,
            latents=latents.detach(),
            features=self.projection(features) if self.projection else features,
            kept=None if share is None else share.expand(batch),
        )

    def start_from(self, other: Tokenizer) -> None:
        """Take the autoencoder of a `KLTokenizer`, or all weights of a FlexTok."""
        if not isinstance(other, KLTokenizer):
            super().start_from(other)
            return
        weights = {k: v for k, v in self.state_dict().items() if not k.startswith("vae.")}
        self.take_over(weights | other.state_dict(), "KLTokenizer")

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that makes velocities: no pixels are compared in training."""
        return self.decoder.head.weight

    def check_images(self, images: Tensor) -> None:
        self.check_vae()
        super().check_images(images)

    def check_vae(self) -> None:
        """Raise `UserError` for images where there is no autoencoder."""
        if self.vae is None:
            raise UserError(
                "this FlexTok has no vae: give it latents (encode_latents, decode_latents), or "
                "build it with a vae"
            )


def _projection(width: int, dim: int) -> nn.Module:
    """The network from hidden states to a teacher's features, which begins at zero."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width),
        nn.SiLU(),
        nn.Linear(4 * width, 4 * width),
        nn.SiLU(),
        zero_linear(4 * width, dim),
    )
