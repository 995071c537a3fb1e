"""1-D tokenizers of any length: the head of the sequence is made to hold what matters most.

In training a random tail of the quantised tokens is dropped before the decoder (One-D-Piece:
Miwa et al., 2025, arXiv:2501.10064; nested dropout: Rippel et al., 2014, arXiv:1402.0915). Then
every prefix decodes.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vistok.decoding.noise import Noise
from vistok.decoding.spelling import read_call
from vistok.errors import UserError
from vistok.tokenizers.base import QuantizedTokenizer, TokenizerOutput

Lengths = int | Int64[Tensor, "b"]


class TailDrop:
    """How many of n tokens training keeps, by its spelling:

    - `uniform`: any number from 1 to n (One-D-Piece); `uniform(a,b)`: from a to b;
    - `pow2`: one of 1, 2, 4, ..., n;
    - `uniform_pow2`: uniform, rounded up to a power of two (FlexTok).

    A word at the end says whether one number serves the whole batch of a process (`batch`, the
    default; tokens are cut off) or each image has its own (`sample`): `uniform(32,480,sample)`,
    `pow2(sample)`. Raises `UserError` for any other spelling.

    Args:
        spelling: as above.
        num_tokens: n.
    """

    def __init__(self, spelling: str, num_tokens: int):
        self.form, arguments = read_call(spelling, "tail drop", ("uniform", "pow2", "uniform_pow2"))
        self.per_sample = arguments[-1:] == ["sample"]
        if arguments and arguments[-1] in ("batch", "sample"):
            arguments = arguments[:-1]
        try:
            self.low, self.high = map(int, arguments or (1, num_tokens))
        except ValueError:
            self.low = self.high = 0
        if not 1 <= self.low <= self.high <= num_tokens or (arguments and self.form != "uniform"):
            raise UserError(
                f"tail drop '{spelling}': expected uniform(a,b) within 1 to {num_tokens}, uniform, "
                "pow2 or uniform_pow2, and batch or sample as the last word in brackets"
            )
        self.num_tokens = num_tokens

    def draw(self, batch: int, device: torch.device) -> Lengths:
        """Return one number for the whole batch, drawn on the CPU, or one for each image."""
        size, where = ((batch,), device) if self.per_sample else ((1,), torch.device("cpu"))
        if self.form == "pow2":
            # n itself counts where it is no power of two.
            exponents = (self.num_tokens - 1).bit_length() + 1
            lengths = 2 ** torch.randint(exponents, size, device=where)
        else:
            lengths = torch.randint(self.low, self.high + 1, size, device=where)
        if self.form == "uniform_pow2":
            powers = 2 ** torch.arange(self.num_tokens.bit_length() + 1, device=where)
            lengths = powers[torch.searchsorted(powers, lengths)]
        lengths = lengths.clamp(max=self.num_tokens)
        return lengths if self.per_sample else int(lengths)


class SequenceTokenizer(QuantizedTokenizer):
    """Images to a sequence of latents, whose tail training drops where `tail_drop` is given. A
    subclass decodes what is kept: see `to_images`."""

    tail_drop: TailDrop | None = None

    def to_images(
        self,
        latents: Float[Tensor, "b k d"],
        kept: Bool[Tensor, "b k"] | None = None,
        text: Float[Tensor, "b l c"] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return images of scale [0, 1], not clamped, from the first k latents, of which `kept`
        marks those that count, if not all do."""
        raise NotImplementedError

    def decode(
        self,
        tokens: Tensor,
        lengths: Int64[Tensor, "b"] | None = None,
        text: Float[Tensor, "b l c"] | None = None,
        noise: Noise | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        self.check_tokens(tokens, lengths)
        self.check_text(text, len(tokens))
        latents = self.quantizer.decode(tokens)
        return self._reconstructed(latents, kept_of(latents, lengths), text).clamp(0, 1)

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        text: Float[Tensor, "b l c"] | None = None,
        lengths: Lengths | None = None,
    ) -> TokenizerOutput:
        """`lengths` are the tokens to keep; by default those that `tail_drop` draws in training."""
        self.check_text(text, len(images))
        latents = self._checked_latents(images)
        result = self.quantizer(latents)
        quantised, kept, share = self.drop_tail(result.quantised, lengths)
        reconstruction, losses = self.compared(images, quantised, kept, text)
        return TokenizerOutput(
            reconstruction=reconstruction,
            tokens=result.ids,
            losses=losses | result.losses,
            usage=result.statistics,
            latents=latents.detach(),
            kept=share,
        )

    def drop_tail(
        self, latents: Float[Tensor, "b n d"], lengths: Lengths | None = None
    ) -> tuple[Float[Tensor, "b k d"], Bool[Tensor, "b k"] | None, Float[Tensor, "b"] | None]:
        """Return the first `lengths` latents, by default those that `tail_drop` draws in training;
        which of them count, if not all do; and their share of all, if any were to be dropped."""
        batch, total = latents.shape[:2]
        if lengths is None and self.training and self.tail_drop is not None:
            lengths = self.tail_drop.draw(batch, latents.device)
        if lengths is None:
            return latents, None, None
        share = (torch.as_tensor(lengths, device=latents.device) / total).expand(batch)
        if isinstance(lengths, int):
            return latents[:, :lengths], None, share
        return latents, kept_of(latents, lengths), share

    def compared(
        self,
        images: Float[Tensor, "b 3 h w"],
        latents: Float[Tensor, "b k d"],
        kept: Bool[Tensor, "b k"] | None,
        text: Float[Tensor, "b l c"] | None,
    ) -> tuple[Float[Tensor, "b 3 h w"] | None, dict[str, Tensor]]:
        """Return what a training step makes of the latents: the reconstruction, None where pixels
        are not compared, and losses of the decoder's own."""
        return self._reconstructed(latents, kept, text), {}

    def check_text(self, text: Tensor | None, batch: int) -> None:
        """Raise `UserError` unless `text` are the features that decoding takes."""
        if self.text_shape is None:
            return
        expected = (batch, *self.text_shape)
        if text is None or tuple(text.shape) != expected:
            found = "no text" if text is None else f"text {tuple(text.shape)}"
            raise UserError(f"{type(self).__name__}: got {found}, expected features {expected}")


def kept_of(
    latents: Float[Tensor, "b k d"], lengths: Int64[Tensor, "b"] | None
) -> Bool[Tensor, "b k"] | None:
    """Return which latents count where the first `lengths` do, None where all do."""
    if lengths is None:
        return None
    positions = torch.arange(latents.shape[1], device=latents.device)
    return positions < lengths.to(latents.device)[:, None]


@torch.no_grad()
def token_contribution(
    tokenizer: SequenceTokenizer,
    tokens: Int64[Tensor, "b k"],
    replacement: Int64[Tensor, "b k"],
    positions: Sequence[int],
    text: Float[Tensor, "b l c"] | None = None,
    batch_size: int = 64,
) -> tuple[Float[Tensor, "p h w"], Float[Tensor, "p h w"]]:
    """Return how much each of the `positions` makes of the images: the absolute and the squared
    differences of every pixel, summed over images and colours, once the token there is that of
    `replacement`, as One-D-Piece is analysed. At most `batch_size` sequences are decoded at a time,
    but those of one position together; pixels are not clamped."""
    tokenizer.check_tokens(tokens)
    tokenizer.check_tokens(replacement)
    tokenizer.check_text(text, len(tokens))

    def decoded(changed: Tensor) -> Tensor:
        """(n b) k -> n b 3 h w"""
        count = len(changed) // len(tokens)
        texts = None if text is None else text.repeat(count, 1, 1)
        latents = tokenizer.quantizer.decode(changed)
        images = tokenizer._reconstructed(latents, None, texts)
        return images.unflatten(0, (count, len(tokens)))

    unchanged = decoded(tokens)
    maps = []
    for at_once in torch.tensor(positions).split(max(1, batch_size // len(tokens))):
        changed = tokens.repeat(len(at_once), 1, 1)
        for i, position in enumerate(at_once.tolist()):
            changed[i, :, position] = replacement[:, position]
        difference = decoded(changed.flatten(0, 1)) - unchanged
        maps.append(torch.stack([difference.abs(), difference.square()]).sum((2, 3)))
    absolute, squared = torch.cat(maps, dim=1)
    return absolute, squared
