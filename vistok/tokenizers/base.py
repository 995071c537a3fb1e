"""What every tokenizer takes and returns."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.models import Model
from vistok.quantizers.base import Quantizer
from vistok.tokens import TokenSpec


@dataclass
class TokenizerOutput:
    """The result of a training forward pass.

    `reconstruction` has the scale of [0, 1] images but is not clamped, as losses need it; `losses`
    are the quantizer's weighted scalars; `usage` holds scalars to log; `latents` are what was
    quantised, for `update_codebook`.
    """

    reconstruction: Float[Tensor, "b 3 *size"]
    tokens: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    usage: dict[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None


class Tokenizer(Model):
    """Images (B, 3, H, W), or videos (B, 3, T, H, W), in [0, 1] to tokens and back.

    Attributes: `image_size`, (height, width) in pixels; `frames`, of a video, None for images;
    `spec`, the tokens of one image or video.
    """

    image_size: tuple[int, int]
    frames: int | None = None
    spec: TokenSpec

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image or video: (3, height, width) or (3, frames, height, width)."""
        return (3, *self.image_size) if self.frames is None else (3, self.frames, *self.image_size)

    def encode(self, images: Float[Tensor, "b 3 *size"]) -> Tensor:
        """Return the tokens, shaped as `spec` says."""
        raise NotImplementedError

    def decode(self, tokens: Tensor) -> Float[Tensor, "b 3 *size"]:
        """Return images clamped to [0, 1]."""
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "b 3 *size"]) -> TokenizerOutput:
        raise NotImplementedError

    def update_codebook(self, latents: Tensor) -> None:
        """Pass one optimiser step's latents to the quantizer; see `Quantizer.update`."""

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that makes pixels, for the adaptive weight of the adversarial loss."""
        raise NotImplementedError

    def check_images(self, images: Tensor) -> None:
        """Raise `UserError` unless `images` are (B, *input_shape)."""
        if tuple(images.shape[1:]) != self.input_shape:
            raise UserError(
                f"{type(self).__name__}: got {'images' if self.frames is None else 'videos'} "
                f"{tuple(images.shape)}, expected (B, {', '.join(map(str, self.input_shape))})"
            )


class QuantizedTokenizer(Tokenizer):
    """Images to latents, one code per latent, and back. A subclass sets `quantizer` and says how
    images become latents and how latents become images.
    """

    quantizer: Quantizer

    def to_latents(self, images: Float[Tensor, "b 3 *size"]) -> Float[Tensor, "b *positions d"]:
        """Return what the quantizer takes, channels last."""
        raise NotImplementedError

    def to_images(self, latents: Float[Tensor, "b *positions d"]) -> Float[Tensor, "b 3 *size"]:
        """Return images of scale [0, 1], not clamped."""
        raise NotImplementedError

    def encode(self, images: Float[Tensor, "b 3 *size"]) -> Int64[Tensor, "b *positions"]:
        return self.quantizer.encode(self._checked_latents(images))

    def decode(self, tokens: Int64[Tensor, "b *positions"]) -> Float[Tensor, "b 3 *size"]:
        self.spec.check(tokens, type(self).__name__)
        return self._reconstructed(self.quantizer.decode(tokens)).clamp(0, 1)

    def forward(self, images: Float[Tensor, "b 3 *size"]) -> TokenizerOutput:
        latents = self._checked_latents(images)
        result = self.quantizer(latents)
        return TokenizerOutput(
            reconstruction=self._reconstructed(result.quantised),
            tokens=result.ids,
            losses=result.losses,
            usage={"usage": result.usage, "perplexity": result.perplexity},
            latents=latents.detach(),
        )

    def update_codebook(self, latents: Float[Tensor, "*positions d"]) -> None:
        self.quantizer.update(latents)

    def _checked_latents(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.to_latents(images.to(self.last_layer.dtype))

    def _reconstructed(self, latents: Tensor) -> Tensor:
        # The quantizer works in float32 whatever the dtype of the weights; losses want float32.
        return self.to_images(latents.to(self.last_layer.dtype)).float()
