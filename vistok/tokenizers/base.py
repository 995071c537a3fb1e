"""What every tokenizer takes and returns."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.decoding.noise import Noise
from vistok.errors import UserError
from vistok.models import Model
from vistok.quantizers import DimensionWise, Gaussian
from vistok.quantizers.base import Quantizer
from vistok.tokens import TokenSpec


@dataclass
class TokenizerOutput:
    """The result of a training forward pass.

    `reconstruction` has the scale of [0, 1] images but is not clamped, as losses need it; it is
    None where training compares no pixels. `losses` are the tokenizer's own weighted scalars;
    `usage` holds scalars to log; `latents` are what was quantised, for `update_codebook`.
    `features` are inner features to be aligned with a teacher's, and `kept` the share of the tokens
    that each image was decoded from.
    """

    reconstruction: Float[Tensor, "b 3 *size"] | None
    tokens: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    usage: dict[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    features: Float[Tensor, "b gh gw d"] | None = None
    kept: Float[Tensor, "b"] | None = None


class Tokenizer(Model):
    """Images (B, 3, H, W), or videos (B, 3, T, H, W), in [0, 1] to tokens and back.

    Attributes: `image_size`, (height, width) in pixels; `frames`, of a video, None for images;
    `spec`, the tokens of one image or video; `text_shape`, (length, channels) of the text features
    that decoding takes, None where it takes none.
    """

    image_size: tuple[int, int]
    frames: int | None = None
    spec: TokenSpec
    text_shape: tuple[int, int] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image or video: (3, height, width) or (3, frames, height, width)."""
        return (3, *self.image_size) if self.frames is None else (3, self.frames, *self.image_size)

    def encode(self, images: Float[Tensor, "b 3 *size"]) -> Tensor:
        """Return the tokens, shaped as `spec` says."""
        raise NotImplementedError

    @property
    def statistics_spec(self) -> TokenSpec:
        """What `statistics` returns."""
        return self.spec

    def statistics(self, images: Float[Tensor, "b 3 *size"]) -> Tensor:
        """Return what generators train on, as token caches hold it: all that `draw` needs to make
        tokens of the images. Where tokens are not random, the tokens themselves."""
        return self.encode(images)

    def draw(self, statistics: Tensor) -> Tensor:
        """Return tokens, shaped as `spec` says, drawn anew at each call where they are random."""
        return statistics

    def decode(
        self,
        tokens: Tensor,
        lengths: Int64[Tensor, "b"] | None = None,
        text: Float[Tensor, "b l c"] | None = None,
        noise: Noise | None = None,
    ) -> Float[Tensor, "b 3 *size"]:
        """Return images clamped to [0, 1].

        Where `spec` is ordered, `tokens` may be a prefix, and `lengths` says how many of its tokens
        count for each image. `text` are the features of captions for tokenizers with a
        `text_shape`; `noise` the randomness of decoders that draw, by default that of images 0, 1,
        ... of seed 0. Other tokenizers do not read them.
        """
        raise NotImplementedError

    def features(self, images: Float[Tensor, "b 3 *size"]) -> dict[str, Float[Tensor, "b n d"]]:
        """Return what a probe may read of the images, by name, a vector each of n places: `tokens`
        are the latents that the tokens stand for; tokenizers of several codebooks name more."""
        raise NotImplementedError

    def forward(
        self, images: Float[Tensor, "b 3 *size"], text: Float[Tensor, "b l c"] | None = None
    ) -> TokenizerOutput:
        raise NotImplementedError

    def update_codebook(self, latents: Tensor) -> None:
        """Pass one optimiser step's latents to the quantizer; see `Quantizer.update`."""

    def start_from(self, other: "Tokenizer") -> None:
        """Take over the weights of a trained tokenizer, all of which must fit; tokenizers that are
        trained in stages say what they take from the stage before."""
        self.take_over(other.state_dict(), type(other).__name__)

    def changed(self, **arguments) -> "Tokenizer":
        """Return a tokenizer with other `arguments` and the same weights, which all must fit."""
        own = self.revive(self.arguments, type(self).__name__)
        changed = type(self)(**(own | arguments)).train(self.training)
        changed.take_over(self.state_dict(), type(self).__name__)
        return nn.Module.to(changed, self.last_layer)

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

    def check_tokens(self, tokens: Tensor, lengths: Tensor | None = None) -> None:
        """Raise `UserError` unless `tokens` are the spec's, and `lengths` such as it allows."""
        self.spec.check(tokens, type(self).__name__)
        if lengths is None:
            return
        if not self.spec.has_prefixes:
            raise UserError(f"{type(self).__name__} makes {self.spec}, which decode as a whole")
        known = [length for length in self.spec.lengths if length <= tokens.shape[1]]
        if lengths.shape != tokens.shape[:1] or not set(lengths.tolist()) <= set(known):
            numbers = f"of {', '.join(map(str, known))}"
            if isinstance(self.spec.lengths, range):
                numbers = f"from 1 to {known[-1]}"
            raise UserError(
                f"{type(self).__name__}: lengths {tuple(lengths.shape)} must be one number "
                f"{numbers} for each of {len(tokens)} images"
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

    def encode(self, images: Float[Tensor, "b 3 *size"]) -> Tensor:
        return self.quantizer.encode(self._checked_latents(images))

    @property
    def statistics_spec(self) -> TokenSpec:
        if not self.quantizer.draws:
            return self.spec
        return TokenSpec.latents(self.spec.shape, self.quantizer.in_dim, self.spec.ordered)

    def statistics(self, images: Float[Tensor, "b 3 *size"]) -> Tensor:
        if not self.quantizer.draws:
            return self.encode(images)
        return self._checked_latents(images).float()

    def draw(self, statistics: Tensor) -> Tensor:
        if not self.quantizer.draws:
            return statistics
        return self.quantizer.encode(statistics, sample=True)

    def decode(
        self,
        tokens: Tensor,
        lengths: Int64[Tensor, "b"] | None = None,
        text: Float[Tensor, "b l c"] | None = None,
        noise: Noise | None = None,
    ) -> Float[Tensor, "b 3 *size"]:
        self.check_tokens(tokens, lengths)
        first = () if lengths is None else (lengths,)
        return self._reconstructed(self.quantizer.decode(tokens, *first)).clamp(0, 1)

    def features(self, images: Float[Tensor, "b 3 *size"]) -> dict[str, Float[Tensor, "b n d"]]:
        return {"tokens": self.quantizer.decode(self.encode(images)).flatten(1, -2)}

    def forward(
        self, images: Float[Tensor, "b 3 *size"], text: Float[Tensor, "b l c"] | None = None
    ) -> TokenizerOutput:
        latents = self._checked_latents(images)
        result = self.quantizer(latents)
        return TokenizerOutput(
            reconstruction=self._reconstructed(result.quantised),
            tokens=result.ids,
            losses=result.losses,
            usage=result.statistics,
            latents=latents.detach(),
        )

    def quantised(self, levels: int = 64, limit: float = 5.0) -> "QuantizedTokenizer":
        """Return the same tokenizer with `DimensionWise` levels in the place of its continuous
        latents; raise `UserError` where it has none."""
        if not isinstance(self.quantizer, Gaussian):
            raise UserError(
                f"{type(self).__name__} makes {self.spec}: only tokenizers of continuous latents "
                "(a Gaussian bottleneck) can be quantised"
            )
        kl, dim = self.quantizer.kl, self.quantizer.dim
        return self.changed(quantizer=DimensionWise(dim, levels, limit, kl=kl))

    def update_codebook(self, latents: Float[Tensor, "*positions d"]) -> None:
        self.quantizer.update(latents)

    def _checked_latents(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.to_latents(images.to(self.last_layer.dtype))

    def _reconstructed(self, latents: Tensor, *more) -> Tensor:
        # The quantizer works in float32 whatever the dtype of the weights; losses want float32.
        return self.to_images(latents.to(self.last_layer.dtype), *more).float()
