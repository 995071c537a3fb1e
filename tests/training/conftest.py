import logging

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """Each run starts as in a process of its own."""
    monkeypatch.setattr("vistok.options.resolved_config", dict)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    logging.getLogger("vistok").setLevel(logging.NOTSET)
