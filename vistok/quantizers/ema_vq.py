"""Vector quantization with a codebook of moving averages (van den Oord et al., 2017,
arXiv:1711.00937, appendix A.1; its start and the revival of codes: SoundStream, Zeghidour et al.,
2021, arXiv:2107.03312, section III.C)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vistok.errors import UserError
from vistok.layers.processes import rows_of_processes, sum_of_processes
from vistok.models import register_to_config
from vistok.quantizers.codebook import Codebook, nearest


class EMAVQ(Codebook):
    """A codebook whose rows are running means of the latents that they are chosen for, and no
    parameters.

    `update` is `begin`, which makes the first codebook, `accumulate`, which averages latents in,
    and `refresh`, which makes the rows anew: layers that share a codebook accumulate one after
    another, by ids of the old rows, and refresh once.

    Args:
        vocab_size: rows of the codebook.
        dim: channels of a latent.
        l2_normalise: search, loss, output and means in the space of unit vectors.
        commitment: weight of the loss that pulls latents to their codes.
        decay: of the averages, at each update.
        smoothing: added to each code's count before rows are divided by it, of which all keep their
            sum (Laplace).
        expiry: average count below which a code gives way to a latent of the batch, drawn by a
            generator whose seed is the number of updates; 0 keeps all codes.
        kmeans: rounds of k-means by which the first update makes the codebook from its latents,
            beginning with drawn ones; 0 keeps the random one.
        rotation: as of `VQ`.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        l2_normalise: bool = False,
        commitment: float = 0.25,
        decay: float = 0.99,
        smoothing: float = 1e-5,
        expiry: float = 0.0,
        kmeans: int = 0,
        rotation: bool = False,
    ):
        super().__init__()
        if not 0 <= decay < 1 or min(smoothing, expiry, kmeans) < 0:
            raise UserError(
                f"{type(self).__name__}: decay {decay:g} must be at least 0 and below 1; smoothing "
                f"{smoothing:g}, expiry {expiry:g} and kmeans {kmeans} must not be negative"
            )
        self.vocab_size = vocab_size
        self.dim = dim
        self.l2_normalise = l2_normalise
        self.commitment = commitment
        self.decay = decay
        self.smoothing = smoothing
        self.expiry = expiry
        self.kmeans = kmeans
        self.rotation = rotation
        codebook = self._normalised(torch.randn(vocab_size, dim))
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(vocab_size))
        self.register_buffer("sums", codebook.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def update(
        self,
        latents: Float[Tensor, "*positions d"],
        order: Int64[Tensor, "n"] | None = None,
    ) -> None:
        """See `Quantizer.update`; `order` are rows of the joint batch in the place of drawn ones,
        all of them in some order."""
        self.begin(latents, order)
        self.accumulate(latents, self.encode(latents))
        self.refresh(latents, order)

    @torch.no_grad()
    def begin(
        self,
        latents: Float[Tensor, "*positions d"],
        order: Int64[Tensor, "n"] | None = None,
    ) -> None:
        """Make the codebook by k-means, where that is due."""
        if self.kmeans == 0 or self.updates > 0:
            return
        latents = self._normalised(latents).flatten(0, -2)
        every = torch.arange(self.vocab_size, device=latents.device)
        means = self._drawn(latents, every, order)
        for _ in range(self.kmeans):
            counts, sums = self._tally(latents, nearest(latents, means))
            found = self._normalised(sums / counts.clamp(min=1).unsqueeze(1))
            means = torch.where(counts.unsqueeze(1) > 0, found, means)
        self._place(torch.ones_like(every, dtype=torch.bool), means, counts)
        self._renew()

    @torch.no_grad()
    def accumulate(
        self, latents: Float[Tensor, "*positions d"], ids: Int64[Tensor, "*positions"]
    ) -> None:
        """Take one step of the averages with latents and their codes."""
        counts, sums = self._tally(self._normalised(latents).flatten(0, -2), ids.flatten())
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)

    @torch.no_grad()
    def refresh(
        self,
        latents: Float[Tensor, "*positions d"],
        order: Int64[Tensor, "n"] | None = None,
    ) -> None:
        """Make the codebook of the averages; replace dead codes by some of `latents`."""
        self._renew()
        if self.expiry > 0:
            latents = self._normalised(latents).flatten(0, -2)
            dead = self.counts < self.expiry
            vectors = self._drawn(latents, (dead.cumsum(0) - 1).clamp(min=0), order)
            self._place(dead, vectors, torch.full_like(self.counts, self.expiry))
        self.updates += 1

    def _renew(self) -> None:
        total = self.counts.sum()
        smoothed = (self.counts + self.smoothing) / (total + self.vocab_size * self.smoothing)
        self.codebook.copy_(self._normalised(self.sums / (smoothed * total).unsqueeze(1)))

    def _tally(
        self, latents: Float[Tensor, "n d"], ids: Int64[Tensor, "n"]
    ) -> tuple[Float[Tensor, "k"], Float[Tensor, "k d"]]:
        """Return how many latents each code is chosen for on all processes, and their sums."""
        rows = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
        tally = rows.new_zeros(self.vocab_size, rows.shape[1]).index_add_(0, ids, rows)
        sums, counts = sum_of_processes(tally).split([self.dim, 1], dim=1)
        return counts.squeeze(1), sums

    def _drawn(
        self, latents: Float[Tensor, "n d"], which: Int64[Tensor, "k"], order: Tensor | None
    ) -> Float[Tensor, "k d"]:
        """Return the `which`-th of the joint batch's latents in a random order, over again once
        these are used up."""
        latents = rows_of_processes(latents)
        if order is None:
            generator = torch.Generator().manual_seed(int(self.updates))
            order = torch.randperm(len(latents), generator=generator).to(latents.device)
        return latents[order[which % len(order)]]

    def _place(
        self, rows: Bool[Tensor, "k"], codes: Float[Tensor, "k d"], counts: Float[Tensor, "k"]
    ) -> None:
        """Set some rows to codes as if the averages had come to these."""
        new = {"codebook": codes, "counts": counts, "sums": codes * counts.unsqueeze(1)}
        for name, buffer in self.named_buffers():
            if name in new:
                column = rows.view(-1, *[1] * (buffer.ndim - 1))
                buffer.copy_(torch.where(column, new[name], buffer))

    def _codes(self) -> Float[Tensor, "k d"]:
        return self.codebook.float()

    def _losses(self, latents: Tensor, quantised: Tensor, codes: Tensor) -> dict[str, Tensor]:
        return {"commitment": self.commitment * F.mse_loss(latents, quantised)}

    def _normalised(self, vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        vectors = vectors.float()
        return F.normalize(vectors, dim=-1) if self.l2_normalise else vectors


class NormEMAVQ(EMAVQ):
    """Averages the directions themselves: a row moves towards the mean direction of its latents,
    however many these are, and stays where there are none (BEiT v2: Peng et al., 2022,
    arXiv:2208.06366, section 2.2).

    Args:
        vocab_size: rows of the codebook.
        dim: channels of a latent.
        commitment: weight of the loss that pulls latents to their codes.
        ema: the other arguments of `EMAVQ`.
    """

    settled = ("l2_normalise", "smoothing")

    @register_to_config
    def __init__(self, vocab_size: int, dim: int, commitment: float = 1.0, **ema):
        super().__init__(vocab_size, dim, l2_normalise=True, commitment=commitment, **ema)
        self.sums = None

    @torch.no_grad()
    def accumulate(
        self, latents: Float[Tensor, "*positions d"], ids: Int64[Tensor, "*positions"]
    ) -> None:
        counts, sums = self._tally(self._normalised(latents).flatten(0, -2), ids.flatten())
        moved = self._normalised(self.codebook.lerp(self._normalised(sums), 1 - self.decay))
        self.codebook.copy_(torch.where(counts.unsqueeze(1) > 0, moved, self.codebook))
        self.counts.lerp_(counts, 1 - self.decay)

    def _renew(self) -> None:
        pass  # rows are averages already
