"""What each of two processes does in test_dist_training.py; it writes OUT/SCENARIO-RANK.json."""

import hashlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from vistok.launch import start_all_processes

start_all_processes()  # before what takes long to import

# ruff: noqa: E402
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny_runs import Squares, quick, tiny_tokenizer, train_generator, train_plain, train_tokenizer

from vistok import ConvTokenizer, LlamaGen
from vistok.errors import UserError
from vistok.training import TrainingState, checkpoint

RANK = int(os.environ["RANK"])


def digest(module) -> str:
    parts = [t.numpy().tobytes() for t in module.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def replicas(output: Path) -> dict:
    """Train tokenizer and generator; return what this process holds in the end."""
    states = []
    original = TrainingState.__init__

    def remember(state, *args, **kwargs):
        original(state, *args, **kwargs)
        states.append(state)

    TrainingState.__init__ = remember
    train_tokenizer(output / "tokenizer", steps=4, validation=Squares())
    train_generator(output / "generator", output / "tokenizer", steps=4)
    TrainingState.__init__ = original
    tokenizer, generator = states
    found = {name: digest(m) for name, m in tokenizer.models.items() if name != "discriminator"}
    found["discriminator"] = [
        float(p.detach().double().sum()) for p in tokenizer.models["discriminator"].parameters()
    ]
    found |= {"tokenizer average": digest(tokenizer.ema), "generator": digest(generator.ema)}
    return {"held": found, "random": torch.rand(1).item()}


def second_part(output: Path) -> dict:
    """Take a run of one process from step 2 to step 4, when process 1 alone is asked to stop."""
    data = Squares(stop_after=6 if RANK == 1 else None)
    train_plain(output, data)
    return {"read": data.read}


class FaultyOnOne(ConvTokenizer):
    """Gives NaN in the fifth call on process 1."""

    calls = 0

    def forward(self, images, text=None):
        result = super().forward(images, text)
        self.calls += 1
        if self.calls == 5 and RANK == 1:
            result.reconstruction = result.reconstruction * float("nan")
        return result


def not_finite(output: Path, policy: str) -> dict:
    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = FaultyOnOne
    error = None
    try:
        train_tokenizer(output, steps=4, tokenizer=tokenizer, run=quick(non_finite=policy))
    except (UserError, SystemExit) as caught:
        error = repr(caught)
    return {"error": error, "weights": digest(tokenizer)}


def failed_save(output: Path) -> dict:
    """Process 1 cannot write its part of the second checkpoint."""
    original = torch.save

    def save(content, path):
        if RANK == 1 and "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        original(content, path)

    checkpoint.torch.save = save
    error = None
    try:
        train_tokenizer(output, run=quick(save_every=2))
    except (UserError, SystemExit) as caught:
        error = repr(caught)
    finally:
        checkpoint.torch.save = original
    return {"error": error}


def sharded(output: Path) -> dict:
    """Train a generator replicated, sharded (FSDP2), and sharded with a stop."""
    tokenizer = output / f"tokenizer-{RANK}"
    tiny_tokenizer().save_pretrained(tokenizer)
    options = {"validation": Squares(), "generator": without_dropout}
    options["run"] = quick(log_every=1, validate_every=3)
    train_generator(output / "replicated", tokenizer, steps=5, **options)

    # Accelerate offers FSDP on accelerators alone; torch, on CPUs as well.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    AcceleratorState._reset_state()
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    train_generator(output / "sharded", tokenizer, steps=5, **options)
    stop = Squares(stop_after=10 if RANK == 1 else None)
    train_generator(output / "parts", tokenizer, steps=5, data=stop, **options)
    train_generator(output / "parts", tokenizer, steps=5, resume=True, **options)
    return {}


def without_dropout(spec, class_names) -> LlamaGen:
    sizes = {"dim": 16, "depth": 2, "num_heads": 2}
    return LlamaGen(spec, class_names, dropout=0.0, condition_dropout=0.0, **sizes)


def killed(output: Path) -> None:
    """Process 1 dies without a word."""

    class Deadly(Squares):
        def __getitem__(self, index):
            if RANK == 1 and len(self.read) == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    train_tokenizer(output, data=Deadly())


def long(output: Path) -> dict:
    """Train until stopped."""
    train_tokenizer(output, steps=100_000, run=quick(log_every=1))
    return {}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    # The end of a run closes the process group, which the next scenario needs.
    Accelerator.end_training = Accelerator.wait_for_everyone
    out = Path(sys.argv[1])
    scenarios = {
        "replicas": lambda: replicas(out / "replicas"),
        "second part": lambda: second_part(out / "parts"),
        "skip": lambda: not_finite(out / "skip", "skip"),
        "stop": lambda: not_finite(out / "stop", "stop"),
        "failed save": lambda: failed_save(out / "failed"),
        "sharded": lambda: sharded(out / "sharded"),
    }
    alone = {"killed": lambda: killed(out / "killed"), "long": lambda: long(out / "long")}
    if sys.argv[2:]:
        scenarios = {name: alone[name] for name in sys.argv[2:]}
    for name, scenario in scenarios.items():
        started = time.monotonic()
        result = {**scenario(), "seconds": time.monotonic() - started}
        (out / f"{name}-{RANK}.json").write_text(json.dumps(result))
