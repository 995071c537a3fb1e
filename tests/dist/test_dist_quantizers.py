"""Two processes, each with half of a batch, keep one codebook, that of one process with the whole.
All quantizers are trained in one start of the processes."""

import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1] / "quantizers"))

from quantizer_worker import NAMES, trained, work


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Weights of the first process, of the second, and of one alone, by quantizer."""
    folder = tmp_path_factory.mktemp("quantizers")
    processes = mp.spawn(work, args=(2, str(folder)), nprocs=2, join=False)
    alone = {name: trained(name) for name in NAMES}
    while not processes.join():
        pass
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)] + [alone]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(outcomes, name):
    first, second, alone = (outcome[name] for outcome in outcomes)
    for key, tensor in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(
            first[key], tensor, rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
        )
