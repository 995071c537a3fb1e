"""Our quantizers against the numbers of the official ones."""

from functools import partial

import pytest
from counterparts import Counterpart, build
from official import Case, cases
from torch import Tensor

from vistok.quantizers import Quantizer, Residual


def variants():
    for case in cases("quantizers"):
        for name in Case(case.values[0]).config["variants"] if case.values[0] else ["none"]:
            yield pytest.param(*case.values, name, id=f"{case.id}-{name}", marks=case.marks)


@pytest.mark.parametrize(("folder", "name"), variants())
def test_quantizer(folder, name):
    case = Case(folder)
    variant = case.config["variants"][name]
    counterpart = build(variant["kind"], variant["args"] | variant.get("call", {}))
    assert counterpart is not None, f"no counterpart of {variant['kind']}({variant['args']})"
    inputs, weights, expected = (
        {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        for tensors in (case.inputs, case.weights, case.expected)
    )
    computed = run(counterpart, variant, inputs, weights)
    case.left = {f"{name}.{key}" for key in expected}
    for key, ours in computed.items():
        theirs = expected.get(key)
        if theirs is not None and channels_first(variant) and theirs.ndim == 4 and "ids" not in key:
            ours = ours.movedim(-1, 1)
        case.compare(f"{name}.{key}", ours)
    case.finish({})


def channels_first(variant: dict) -> bool:
    return len(variant["x"]) == 4


def run(
    counterpart: Counterpart, variant: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return our outputs by their names: in evaluation, in training, after further steps."""
    quantizer, computed = counterpart.quantizer, {}
    inputs = {
        key: x.movedim(1, -1) if x.ndim == 4 and channels_first(variant) else x
        for key, x in inputs.items()
    }
    latents, drawn = inputs["x"].contiguous().requires_grad_(), {}
    if "perm" in inputs:
        drawn = {"order": inputs["perm"]}
    counterpart.load(weights)
    if counterpart.begins:
        quantizer.begin(latents, **drawn)

    evaluated = quantizer.eval()(latents)
    computed |= {"eval.ids": counterpart.ids(evaluated.ids), "eval.quant": evaluated.quantised}
    computed["decode"] = quantizer.decode(evaluated.ids)

    if counterpart.layers is not None:
        use(counterpart.layers, quantizer)
    result = quantizer.train()(latents)
    ids = counterpart.ids(result.ids)
    if counterpart.layers is not None:  # the others' ids are ours alone
        ids[..., counterpart.layers :] = -1
    computed |= {"train.ids": ids, "train.quant": result.quantised}
    terms = counterpart.terms(result, latents)
    computed |= {f"train.{term}": value for term, value in terms.items()}
    ((result.quantised * inputs["upstream"]).sum() + sum(result.losses.values())).backward()
    computed["train.grad_x"] = latents.grad
    gradients = {k: p.grad for k, p in quantizer.named_parameters() if p.grad is not None}
    computed |= {f"train.grad.{k}": grad for k, grad in counterpart.official(gradients).items()}

    quantizer.update(latents.detach(), **drawn)
    for step in range(1, variant.get("steps", 1)):
        further = inputs[f"x{step}"]
        computed[f"step{step}.ids"] = quantizer(further).ids
        quantizer.update(further, **drawn)
    state = counterpart.official(quantizer.state_dict())
    return computed | {f"state.{name}": value for name, value in state.items()}


def use(layers: int, quantizer: Quantizer) -> None:
    """Let residual quantizers use so many layers, whatever they would draw."""
    for residual in quantizer.modules():
        if isinstance(residual, Residual):
            residual.forward = partial(residual.forward, layers=layers)
            residual.update = partial(residual.update, layers=layers)
