"""Shared settings: shapes in signatures are checked, numbers are reproducible, threads are few."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

install_import_hook(
    [
        "vistok.checkpoints",
        "vistok.data",
        "vistok.decoding",
        "vistok.generators",
        "vistok.heads",
        "vistok.layers",
        "vistok.losses",
        "vistok.metrics",
        "vistok.quantizers",
        "vistok.tokenizers",
        "vistok.training",
    ],
    "beartype.beartype",
)

import torch  # noqa: E402 - after the thread count is set


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)
