"""A linear encoder, a quantizer and a linear decoder, trained on one process or on several."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from family import POSITIONS, QUANTIZERS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

NAMES = [name for name, make in QUANTIZERS.items() if not make().draws]
STEPS, IMAGES, CHANNELS = 200, 4, 6


class Coder(nn.Module):
    def __init__(self, quantizer):
        super().__init__()
        self.encoder = nn.Linear(CHANNELS, quantizer.in_dim)
        self.quantizer = quantizer
        self.decoder = nn.Linear(quantizer.dim, CHANNELS)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encoder(inputs)
        result = self.quantizer(latents)
        loss = F.mse_loss(self.decoder(result.quantised), inputs)
        return loss + sum(result.losses.values()), latents.detach()


def trained(name: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Return all weights after some steps, each with a share of one batch."""
    torch.manual_seed(0)
    coder = Coder(QUANTIZERS[name]())
    model = DistributedDataParallel(coder, broadcast_buffers=False) if world > 1 else coder
    sgd = torch.optim.SGD(coder.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = torch.randn(IMAGES, *POSITIONS, CHANNELS, generator=generator)
        sgd.zero_grad()
        loss, latents = model(batch.chunk(world)[rank])
        loss.backward()
        sgd.step()
        coder.quantizer.update(latents)
    return coder.state_dict()


def work(rank: int, world: int, folder: str) -> None:
    """Train every quantizer as one of several processes, and leave the weights in a folder."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    weights = {name: trained(name, rank, world) for name in NAMES}
    torch.save(weights, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
