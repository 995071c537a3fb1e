"""Every exported generator of vectors of numbers, in tiny form, with every kind of head."""

import inspect

import pytest
import torch

import vistok
from vistok.decoding import (
    Decoding,
    Noise,
    Order,
    RandomPlan,
    Sampler,
    Schedule,
    decode_random,
)
from vistok.decoding import decode as decode_planned
from vistok.errors import IncompatibleTokensError, UserError
from vistok.generators import MAR, XAR, FlowAR, Generator
from vistok.heads import DiffusionHead, DimensionWiseHead, FlowHead, FlowTransformerHead
from vistok.tokens import TokenSpec

GRID, ODD, SEQUENCE = (TokenSpec.latents(shape, 3) for shape in ((4, 4), (2, 4), (7,)))
DIGITS = TokenSpec.factorised((4, 4), (8, 8, 8), values="normal(5,3)")
SIZES = {"dim": 32, "depth": 2, "num_heads": 4}
FEW, SCALES = {"buffer": 4, "mask_ratio_min": 0.3}, {"scales": (1, 2, 4), "decoder_depth": 1}
DIFFUSION, DIMENSION_WISE = DiffusionHead(32, 2), DimensionWiseHead(32, 1, 4)
VARIANTS = {
    MAR: [
        (GRID, {**FEW, "head": DIFFUSION}),
        (ODD, {**FEW, "head": DIFFUSION, "decoder_dim": 48, "decoder_depth": 1}),
        (SEQUENCE, {**FEW, "head": DIFFUSION, "mlp_ratio": 2.0}),
        (GRID, {**FEW, "head": DIFFUSION, "patch_size": 2}),
        (DIGITS, {**FEW, "head": DIFFUSION}),
        (GRID, {**FEW, "head": FlowHead(32, 2)}),
        (DIGITS, {**FEW, "head": DIMENSION_WISE, "patch_size": 2}),
        (GRID, {**FEW, "head": DIMENSION_WISE}),
    ],
    XAR: [
        (GRID, {"order": "cells(2)"}),
        (ODD, {"order": "cells(1)"}),
        (GRID, {"order": "subsamples(2)", "decoder_depth": 1, "decoder_num_heads": 2}),
        (GRID, {"order": "scales(1,2,4)"}),
    ],
    FlowAR: [
        (GRID, {**SCALES, "head": FlowTransformerHead(64, 1)}),
        (GRID, {"scales": (1, 4), "depth": 1, "head": FlowTransformerHead(64, 1, cross=True)}),
        (GRID, {**SCALES, "head": DIFFUSION}),
        (GRID, {**SCALES, "head": DIMENSION_WISE}),
    ],
}
EXPORTED = [
    c
    for c in (getattr(vistok, name) for name in vistok.__all__)
    if inspect.isclass(c) and issubclass(c, Generator) and "latents" in c.kinds
]
LABELS = torch.tensor([0, 2, 1])


def tiny(family: type[Generator], spec: TokenSpec, **more) -> Generator:
    """A model with random weights everywhere, so that nothing is trivially zero."""
    model = family(spec, ["a", "b", "c"], **{**SIZES, **more}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


MODELS = {
    f"{family.__name__}-{number}": (family, *variant)
    for family, variants in VARIANTS.items()
    for number, variant in enumerate(variants)
}


@pytest.fixture(params=MODELS)
def model(request):
    family, spec, arguments = MODELS[request.param]
    return tiny(family, spec, **arguments)


def decode(model, condition, noise, decoding=None):
    """Decode by whichever loop the model's plan asks for."""
    loop = decode_random if isinstance(model.plan(), RandomPlan) else decode_planned
    return loop(model, condition, noise, decoding)


def settings(model, **more) -> Decoding:
    """Few steps; those of diffusion begin where errors are not yet magnified."""
    samplers = model.head.samplers
    if samplers:
        more = {"steps": Schedule("linear(5,3)"), **more}
    if "ddpm" in samplers:
        more = {"sampler": Sampler("ddpm(950)"), **more}
    return Decoding(**more)


def random_tokens(spec: TokenSpec, batch: int) -> torch.Tensor:
    if spec.kind == "factorised":
        return torch.randint(spec.levels[0], (batch, *spec.tensor_shape))
    return torch.randn(batch, *spec.tensor_shape)


def check_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the rounding of products of other sizes, which chains of steps magnify."""
    spread = theirs.double().std().item()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * spread)


def check_tokens(model, tokens: torch.Tensor) -> None:
    model.spec.check(tokens, "decoded")
    assert tokens.double().isfinite().all()


def test_every_family_has_its_variants():
    assert set(VARIANTS) == set(EXPORTED)


def test_an_image_depends_on_its_seed_index_and_class_alone(model):
    labels = torch.tensor([0, 1, 2, 0])
    decoding = settings(model, guidance=Schedule("linear(1,2.5)"))

    def run(indices):
        return decode(model, labels[indices], Noise(1, indices), decoding)

    together = run(torch.arange(4))
    for batch in (3, 1):
        check_close(torch.cat([run(part) for part in torch.arange(4).split(batch)]), together)
    order = torch.tensor([2, 0, 3, 1])
    check_close(run(order), together[order])
    assert not torch.equal(together[0], together[3])
    other = decode(model, labels, Noise(2, range(4)), decoding)
    assert not torch.equal(other, together)


def test_guidance_halves_are_dropped_where_it_is_off(model):
    name = "hidden" if isinstance(model.plan(), RandomPlan) else "draw"
    method, batches = getattr(model, name), []

    def counted(tokens, condition, *rest):
        batches.append(len(condition))
        return method(tokens, condition, *rest)

    setattr(model, name, counted)
    decoding = settings(model, guidance=Schedule("interval(3,0,0.5)"))
    decode(model, LABELS, Noise(0, range(3)), decoding)
    scales = decoding.scales(model.plan())
    assert batches == [6 if scale != 1 else 3 for scale in scales]
    assert len(set(batches)) == 2


def test_guidance_of_scale_one_is_none(model):
    """The null half of a guidance that does next to nothing changes next to nothing."""
    runs = [
        decode(model, LABELS, Noise(0, range(3)), settings(model, guidance=Schedule(scale)))
        for scale in (1, 1 + 1e-7)
    ]
    check_close(*runs)


def test_a_repeated_call_is_clean(model):
    before = set(model.state_dict())
    decoding = settings(model, guidance=Schedule(2))
    first = decode(model, LABELS, Noise(0, range(3)), decoding)
    other = decoding.changed(guidance=Schedule("interval(2,0,0.5)"))
    decode(model, LABELS.flip(0)[:2], Noise(9, range(2)), other)
    assert torch.equal(decode(model, LABELS, Noise(0, range(3)), decoding), first)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_model_samples_under_autocast(model, dtype):
    fresh = type(model).from_config(model.arguments).eval()
    decodings = [settings(model, guidance=Schedule(4))]
    if model.head.samplers:  # by the head's own sampler, too, from the very noise
        decodings.append(Decoding(guidance=Schedule(4), steps=Schedule(4)))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for decoding in decodings:
            check_tokens(model, decode(fresh, LABELS, Noise(0, range(3)), decoding))


def test_every_parameter_is_trained(model):
    model.train()
    for _ in range(12):  # some of which may mask all tokens
        tokens = random_tokens(model.spec, 16)
        model(tokens, torch.randint(3, (16,))).loss.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("variant", [0, -1])
@pytest.mark.parametrize("family", VARIANTS)
def test_samples_approach_the_data(family, variant):
    """Two images, one per class: the model learns to tell them apart."""
    spec, more = VARIANTS[family][variant]
    more = {**SIZES, **more, "dropout": 0.0, "condition_dropout": 0.0}
    model = family(spec, ["a", "b"], **more).train()
    tokens, labels = random_tokens(spec, 2), torch.arange(2)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(tokens.repeat(8, *[1] * (tokens.ndim - 1)), labels.repeat(8)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    drawn = decode(model.eval(), labels, Noise(0, range(2)), settings(model, steps=Schedule(20)))
    own = (drawn - tokens).abs().double().mean()
    other = (drawn - tokens.flip(0)).abs().double().mean()
    assert own < 0.6 * other


def test_saved_models_load_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.spec == model.spec
    runs = [decode(m, LABELS, Noise(0, range(3)), settings(m)) for m in (loaded, model)]
    assert torch.equal(*runs)


def test_a_model_loaded_in_half_precision_samples(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert loaded.dtype == torch.bfloat16
    decoding = settings(loaded, guidance=Schedule(2))
    check_tokens(loaded, decode(loaded, LABELS, Noise(0, range(3)), decoding))


@pytest.mark.parametrize("family", VARIANTS)
def test_unfit_specs_and_sizes_are_refused(family):
    spec, arguments = VARIANTS[family][0]
    with pytest.raises(IncompatibleTokensError, match=family.__name__):
        tiny(family, TokenSpec.ids((4, 4), 11), **arguments)
    with pytest.raises(UserError, match="multiple"):
        tiny(family, spec, **{**arguments, "num_heads": 5})
    with pytest.raises(UserError, match="expected"):
        tiny(family, spec, **arguments)(torch.zeros(2, 5, 5, 3), torch.zeros(2).long())


def test_orders_and_samplers_of_others_are_refused(model):
    with pytest.raises(UserError, match="not by raster"):
        model.plan(Order("raster"))
    unknown = "ddpm" if "ddpm" not in model.head.samplers else "euler"
    with pytest.raises(UserError, match=f"no sampler '{unknown}'"):
        decode(model, LABELS, Noise(0, range(3)), Decoding(sampler=Sampler(unknown)))


@pytest.mark.slow
@pytest.mark.parametrize("family", VARIANTS)
def test_compiled_decoding_gives_the_eager_tokens(family):
    spec, arguments = VARIANTS[family][0]
    model = tiny(family, spec, **{**arguments, "depth": 1})
    decoding = settings(model, guidance=Schedule(2))
    eager = decode(model, LABELS, Noise(0, range(3)), decoding)
    model.compile_decoding()
    check_close(decode(model, LABELS, Noise(0, range(3)), decoding), eager)
