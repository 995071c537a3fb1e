"""Our quantizers against the numbers of the official ones, in the folder VISTOK_PARITY."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vistok.quantizers import FSQ, VQ

FOLDER = os.environ.get("VISTOK_PARITY")
if not FOLDER:
    pytest.skip("VISTOK_PARITY names no folder of numbers", allow_module_level=True)


def build(kind, args):
    """Return our counterpart of an official quantizer, or None."""
    if kind == "FSQ" and set(args) == {"levels"}:
        return FSQ(args["levels"])
    if kind == "seed.VectorQuantizer2" and args["legacy"] is False and "l2_normalize" not in args:
        return VQ(args["n_e"], args["e_dim"], l2_normalise=False, commitment=args["beta"])
    return None


def variants():
    for path in sorted(Path(FOLDER).glob("quantizers/*/case.json")):
        case = json.loads(path.read_text())
        for name, variant in case["config"]["variants"].items():
            if build(variant["kind"], variant["args"]) is not None:
                yield pytest.param(path.parent, case, name, id=f"{path.parent.name}-{name}")


@pytest.mark.parametrize(("folder", "case", "name"), variants())
def test_quantizer(folder, case, name):
    variant = case["config"]["variants"][name]
    tensors = load_file(folder / "tensors.safetensors")
    weights = load_file(folder / "weights.safetensors")
    quantizer = build(variant["kind"], variant["args"])
    prefix = f"{name}."
    quantizer.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    pictures = len(variant["x"]) == 4  # channels first

    def channels_last(x):
        return x.movedim(1, -1) if pictures else x

    latents = tensors[f"in.{name}.x"].requires_grad_()
    computed = {}
    for mode in ("train", "eval"):
        result = quantizer.train(mode == "train")(channels_last(latents))
        computed[f"{mode}.ids"] = result.ids
        computed[f"{mode}.quant"] = result.quantised
        if mode == "train":
            total = sum(result.losses.values(), torch.zeros(()))
            upstream = channels_last(tensors[f"in.{name}.upstream"])
            ((result.quantised * upstream).sum() + total).backward()
            computed["train.loss"] = total
            computed["train.grad_x"] = channels_last(latents.grad)
            for key, parameter in quantizer.named_parameters():
                computed[f"train.grad.{key}"] = parameter.grad
    computed["decode"] = quantizer.decode(result.ids)

    expected = {
        k.removeprefix(f"out.{name}."): v
        for k, v in tensors.items()
        if k.startswith(f"out.{name}.")
    }
    for key, value in expected.items():
        ours = computed[key]
        if value.ndim == 4:
            value = channels_last(value)
        value = value.reshape(ours.shape).to(ours.dtype)
        tolerance = dict.fromkeys(("atol", "rtol"), 0) if "ids" in key else case["tolerance"]
        torch.testing.assert_close(ours, value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")
