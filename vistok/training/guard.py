"""A step whose loss or gradient is not finite is taken on no process."""

import json
import logging
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vistok.errors import UserError
from vistok.files import replaced
from vistok.training.processes import any_process, together

logger = logging.getLogger(__name__)


Terms = dict[str, Float[Tensor, ""]]


def guarded_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    seen: list[Terms],
    max_grad_norm: float,
) -> tuple[bool, Float[Tensor, ""]]:
    """Clip the gradients of `model`, step and clear them; on no process if the gradient's norm, or
    any loss term of the micro-batches `seen`, is not finite on any. Returns whether the step was
    taken, and the norm before clipping.

    The answer is the one value per step that the host waits for: averages and codebooks need it.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    if isinstance(norm, DTensor):  # of sharded parameters
        norm = norm.full_tensor()
    finite = torch.stack([term for terms in seen for term in terms.values()]).isfinite().all()
    scaler = accelerator.scaler
    if scaler is None:  # with one (fp16), gradients that overflow are its business
        finite = finite & norm.isfinite()
    taken = not any_process(accelerator, ~finite)
    if taken:
        optimizer.step()
    elif scaler is not None:
        scaler.update()
    optimizer.zero_grad()
    return taken, norm


def report_non_finite(
    accelerator: Accelerator,
    output: Path,
    step: int,
    batches: list[dict[str, Tensor]],
    seen: list[Terms],
    policy: Literal["stop", "skip"],
) -> None:
    """Write down the samples of all processes in `step`, which was not taken; raise `UserError` if
    the policy is to stop."""
    indices = torch.cat([batch["index"] for batch in batches]).to(accelerator.device)
    indices = accelerator.gather(indices).tolist()
    means = {name: sum(float(terms[name]) for terms in seen) / len(seen) for name in seen[0]}
    terms = gather_object([{name: str(mean) for name, mean in means.items()}])
    path = output / "non-finite" / f"step-{step:08d}.json"
    problem = f"step {step}: the loss or its gradient is not finite"
    with together(accelerator, f"writing {path}"):
        if accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            with replaced(path) as aside:
                record = {"step": step, "terms_by_process": terms, "samples": indices}
                aside.write_text(json.dumps(record) + "\n")
            if policy == "stop":
                raise UserError(
                    f"{problem}, see {path} for its samples; to pass over such steps, resume with "
                    "--run.non_finite skip --allow_changes true"
                )
            logger.warning(f"{problem}: skipped on all processes, see {path} for its samples")
