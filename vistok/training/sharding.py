"""State dicts of whole models and optimisers, whether every process holds all of them (one process,
DDP) or a shard (FSDP2). Reading is a collective: every process must call it."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from vistok.training.ema import EMA

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def load_model_state(accelerator: Accelerator, model: nn.Module, state: dict[str, Any]) -> None:
    """The inverse of `accelerator.get_state_dict(model)`; every process passes the whole state."""
    if accelerator.is_fsdp2:
        set_model_state_dict(model, state, options=WHOLE)
    else:
        accelerator.unwrap_model(model).load_state_dict(state)


def optimizer_moments(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer
) -> dict[Any, Any]:
    """Return the optimiser's state without its hyperparameters, which the config gives."""
    if accelerator.is_fsdp2:
        # Only the main process receives it.
        return get_optimizer_state_dict(model, optimizer, options=WHOLE).get("state", {})
    return optimizer.state_dict()["state"]


def load_optimizer_moments(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, moments: dict[Any, Any]
) -> None:
    """The inverse of `optimizer_moments`."""
    if accelerator.is_fsdp2:
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [
            {**group, "params": [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        state = {"state": moments, "param_groups": groups}
        set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
    else:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})


def shard_like_model(accelerator: Accelerator, ema: EMA) -> None:
    """Shard the average as `Accelerator.prepare` has sharded the model it follows."""
    if accelerator.is_fsdp2:
        ema.module = fsdp2_prepare_model(accelerator, ema.module)
        ema.module.set_reshard_after_forward(True)  # no backward pass will do it


def unsharded(accelerator: Accelerator, ema: EMA, state: dict[str, Tensor]) -> nn.Module:
    """Return the averaged model in one piece, `state` being its whole state on this process."""
    if not accelerator.is_fsdp2:
        return ema.module
    model = ema.model_class.from_config(ema.module.arguments)
    model.load_state_dict(state)
    return model.eval()
