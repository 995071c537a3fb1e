"""MAR (Li et al., 2024, arXiv:2406.11838) and what keeps its layout: DiSA (Zhao et al., 2025,
arXiv:2505.20297), which only draws in other steps, and heads that are saved alone."""

from typing import Any

import torch

from vistok.checkpoints.files import Weights, load, rename
from vistok.errors import CheckpointError
from vistok.heads import DiffusionHead
from vistok.tokens import TokenSpec

# Names of the diffusion head inside a model and, without the first part, alone.
HEAD_RULES = (
    (r"^(diffloss\.)?net\.", "head.net."),
    (r"^(head\.net\.)time_embed\.mlp\.", r"\1time."),
    (r"^(head\.net\.)cond_embed\.", r"\1condition."),
    (r"^(head\.net\.)input_proj\.", r"\1input."),
    (r"^(head\.net\.)final_layer\.linear\.", r"\1output."),
    (r"^(head\.net\.)res_blocks\.(\d+)\.in_ln\.", r"\1blocks.\2.norm."),
    (r"^(head\.net\.)res_blocks\.(\d+)\.mlp\.0\.", r"\1blocks.\2.fc1."),
    (r"^(head\.net\.)res_blocks\.(\d+)\.mlp\.2\.", r"\1blocks.\2.fc2."),
)


def join_modulations(weights: Weights) -> None:
    """Make one matrix of those that modulate the blocks and the output of a renamed head, whose
    scales here have a bias about 1."""
    depth = sum(name.endswith(".norm.weight") for name in weights if name.startswith("head.net."))
    parts = [*(f"res_blocks.{i}" for i in range(depth)), "final_layer"]
    for kind in ("weight", "bias"):
        names = [f"head.net.{part}.adaLN_modulation.1.{kind}" for part in parts]
        weights[f"head.net.modulation.{kind}"] = torch.cat([weights.pop(name) for name in names])
    bias = weights["head.net.modulation.bias"].unflatten(0, (3 * depth + 2, -1))
    bias[1::3] += 1


def new_head(weights: Weights, **training: Any) -> DiffusionHead:
    """Return a head, not yet fitted to a trunk, of the size of renamed weights."""
    width, depth = len(weights["head.net.input.weight"]), 0
    while f"head.net.blocks.{depth}.norm.weight" in weights:
        depth += 1
    return DiffusionHead(width, depth, **training)


def head(weights: Weights, where: str = "weights", **training: Any) -> DiffusionHead:
    """Return the diffusion head that has these weights, its sizes read from their shapes;
    `training` are options of `DiffusionHead` that matter in training alone. Raises
    `CheckpointError` if a tensor is missing, superfluous or of another shape."""
    try:
        weights = rename(weights, HEAD_RULES, where)
        join_modulations(weights)
        hidden_dim = weights["head.net.condition.weight"].shape[1]
        channels = weights["head.net.input.weight"].shape[1]
        fresh = new_head(weights, **training)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{where}: not a diffusion head of MAR ({error})") from error
    model = fresh.fitted(hidden_dim, TokenSpec.latents((1,), channels))
    load(model, rename(weights, [(r"^head\.", "")], where), where)
    return model
