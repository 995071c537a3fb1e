"""Compile every quantizer of the family, in a process of its own, since the checks of shapes that
tests run with are not to be traced. Prints what differs from eager as JSON, by name."""

import json
import sys

import torch
from family import POSITIONS, QUANTIZERS

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
INDUCTOR = ("ema-vq", "fsq", "vq")  # the others stop short of making code, which takes seconds


def outcome(quantizer, forward, latents):
    """Return results and gradients of a forward pass in the quantizer's mode."""
    latents = latents.clone().requires_grad_()
    quantizer.zero_grad()
    result = forward(latents)
    (result.quantised.square().sum() + sum(result.losses.values())).backward()
    gradients = {name: p.grad for name, p in quantizer.named_parameters() if p.grad is not None}
    found = {"quantised": result.quantised, "latents": latents.grad, **gradients, **result.losses}
    return result.ids, {k: v.detach().clone() for k, v in (found | result.statistics).items()}


def difference(name: str) -> str:
    torch.manual_seed(0)
    torch.compiler.reset()
    quantizer = QUANTIZERS[name]()
    latents = torch.randn(2, *POSITIONS, quantizer.in_dim)
    backend = "inductor" if name in INDUCTOR else "aot_eager"
    modes = [not quantizer.draws] + [False] * (name in INDUCTOR)
    for training in modes:
        quantizer.train(training)
        compiled = torch.compile(quantizer, fullgraph=True, backend=backend)
        ids, found = outcome(quantizer, compiled, latents)
        expected_ids, expected = outcome(quantizer, quantizer, latents)
        if not torch.equal(ids, expected_ids):
            return f"ids differ (training {training})"
        try:
            torch.testing.assert_close(found, expected, **CLOSE)
        except AssertionError as error:
            return f"{error} (training {training})"
    return ""


if __name__ == "__main__":
    found = {}
    for name in QUANTIZERS:
        try:
            found[name] = difference(name)
        except Exception as error:  # one that cannot be compiled leaves the others to be told of
            found[name] = f"{type(error).__name__}: {error}"
    json.dump(found, sys.stdout)
