"""Every exported generator of ids, in tiny form."""

import inspect
import re

import pytest
import torch

import vistok
from vistok.commands.info import describe
from vistok.decoding import (
    Corrected,
    Decoding,
    MaskedPlan,
    Noise,
    Order,
    Schedule,
    decode_masked,
    sample_categorical,
)
from vistok.decoding import decode as decode_planned
from vistok.decoding.sampling import Sampling
from vistok.errors import CheckpointError, IncompatibleTokensError, UserError
from vistok.generators import (
    NAR,
    PAR,
    RAR,
    VAR,
    Captions,
    Generator,
    LlamaGen,
    MaskGIT,
    NextScaleLlama,
)
from vistok.generators.conditions import ClassCondition
from vistok.quantizers import VQ, MultiScale
from vistok.tokens import TokenSpec

GRID, ODD, SEQUENCE, VIDEO = (
    TokenSpec.ids(shape, 11, ordered=len(shape) == 1) for shape in ((4, 4), (3, 5), (9,), (2, 3, 4))
)
SIZES = {"dim": 48, "depth": 2, "num_heads": 4}
EXPORTED = [
    c
    for c in (getattr(vistok, name) for name in vistok.__all__)
    if inspect.isclass(c) and issubclass(c, Generator) and c is not Generator and "ids" in c.kinds
]


def of_scales(scales, **more):
    codes = MultiScale(VQ(11, 3, l2_normalise=False), scales)
    return codes.spec(codes.scales[-1]), {"codes": codes, **more}


VARIANTS = {
    LlamaGen: [
        (GRID, {}),
        (ODD, {"num_kv_heads": 2}),
        (SEQUENCE, {}),
        (SEQUENCE, {"positions": "learned", "norm": "layer", "qk_norm": True}),
        (VIDEO, {}),
        (ODD, {"order": "diagonal"}),
        (GRID, {"order": "random(3)"}),
        (GRID, {"caption_dim": 6, "caption_length": 5}),
    ],
    PAR: [
        (GRID, {}),
        (TokenSpec.ids((3, 6), 11), {"regions": 9}),
        (TokenSpec.ids((2, 4, 4), 11), {"positions": "fixed"}),
        (GRID, {"caption_dim": 6, "caption_length": 5}),
    ],
    NAR: [
        (GRID, {}),
        (ODD, {"extra_depth": 2}),
        (SEQUENCE, {}),
        (VIDEO, {"positions": "learned"}),
        (ODD, {"caption_dim": 6, "caption_length": 5}),
    ],
    MaskGIT: [
        (GRID, {}),
        (SEQUENCE, {"backbone": "uvit"}),
        (VIDEO, {"backbone": "uvit", "depth": 3, "hidden_dim": 40}),
    ],
    RAR: [(GRID, {}), (ODD, {"hidden_dim": 40}), (SEQUENCE, {}), (VIDEO, {})],
    VAR: [
        of_scales((1, 2, 4)),
        of_scales((2, (3, 4)), hidden_dim=40, cosine=False),
        of_scales((1, 2, 3), shared_modulation=True),
    ],
    NextScaleLlama: [
        of_scales((1, 2, 4)),
        of_scales((1, (2, 3)), num_kv_heads=2, hidden_dim=40, caption_dim=6, caption_length=5),
    ],
}
MASKED = (MaskGIT,)  # these see all tokens in each pass, without a cache


def tiny(family: type[Generator], spec: TokenSpec, **more) -> Generator:
    """A model with random weights everywhere, so that no logit is trivially zero."""
    model = family(spec, ["a", "b", "c"], **{**SIZES, **more}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def variants(families):
    """Parametrize a fixture by the families' variants."""
    return pytest.fixture(
        params=[(f, *v) for f in families for v in VARIANTS[f]],
        ids=lambda p: f"{p[0].__name__}-{p[1]}-{ {k: v for k, v in p[2].items() if k != 'codes'} }",
    )


@variants(EXPORTED)
def model(request):
    family, spec, arguments = request.param
    return tiny(family, spec, **arguments)


@variants([f for f in EXPORTED if f not in MASKED])
def cached(request):
    """A model that decodes with a key-value cache."""
    family, spec, arguments = request.param
    return tiny(family, spec, **arguments)


def decode(model, condition, noise, decoding=None, *state):
    """Decode by whichever loop the model's plan asks for."""
    if isinstance(model.plan(), MaskedPlan):
        return decode_masked(model, condition, noise, decoding)
    return decode_planned(model, condition, noise, decoding, *state)


def condition_of(model, labels):
    """Labels, or captions of as many kinds, of different lengths."""
    if isinstance(model.condition, ClassCondition):
        return labels
    kinds = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    return Captions.left_padded(kinds[labels], torch.tensor([2, 5, 3])[labels])


LABELS = torch.tensor([0, 2, 1])


def full_logits(model, tokens, condition):
    """The forward pass of training, all rows at once; positions in their own order."""
    return model.head.logits(model.teacher_forced(tokens, condition))


@torch.inference_mode()
def test_cached_steps_give_the_logits_of_the_full_forward(cached):
    model = cached
    tokens, condition = (
        torch.randint(11, (3, *model.spec.tensor_shape)),
        condition_of(model, LABELS),
    )
    plan = model.plan()
    state = model.new_state(3, plan)
    steps = [
        model.head.logits(model.step(tokens.flatten(1), condition, fed, state))
        for fed in plan.passes
    ]
    full = full_logits(model, tokens, condition)
    order = torch.cat([fed.predict for fed in plan.passes])
    assert torch.allclose(torch.cat(steps, dim=1), full[:, order], atol=2e-5, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy(full.transpose(1, 2), tokens.flatten(1))
    assert torch.allclose(model(tokens, condition).loss, loss, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("guidance", ["1", "linear(1,3)", "interval(3,0,0.4)"])
def test_the_loop_gives_the_tokens_of_a_reference_without_cache(cached, guidance):
    model = cached
    decoding = Decoding(guidance=Schedule(guidance), temperature=Schedule("linear(1.2,0.8)"))
    condition = condition_of(model, LABELS)
    fast = decode(model, condition, Noise(5, range(3)), decoding)

    n, plan = model.spec.num_tokens, model.plan()
    tokens, uniform = torch.zeros(3, n, dtype=torch.long), Noise(5, range(3)).uniform(n)
    for fed, fraction in zip(plan.passes, plan.fractions, strict=True):
        shaped, at = tokens.view(3, *model.spec.tensor_shape), fed.predict
        logits = full_logits(model, shaped, condition)[:, at]
        null = full_logits(model, shaped, model.null_condition(condition))[:, at]
        logits = null + Schedule(guidance)(fraction) * (logits - null)
        sampling = Sampling(Schedule("linear(1.2,0.8)")(fraction))
        tokens[:, at] = sample_categorical(logits, uniform[:, at], sampling)
    assert torch.equal(fast.flatten(1), tokens)


def test_a_repeated_call_is_clean(cached):
    model, decoding = cached, Decoding(guidance=Schedule(2), top_k=Corrected(5))
    plan = model.plan()
    state = model.new_state(6, plan)
    memory = state.cache.memory.data_ptr()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first = decode(model, condition_of(model, LABELS), Noise(0, range(3)), decoding, state)
    decode(
        model,
        condition_of(model, LABELS.flip(0)),
        Noise(9, range(3)),
        Decoding(guidance=Schedule("interval(2,0,0.5)")),
        state,
    )
    again = decode(model, condition_of(model, LABELS), Noise(0, range(3)), decoding, state)
    assert torch.equal(first, again)
    assert state.cache.memory.data_ptr() == memory
    assert set(model.state_dict()) == set(before)


def test_an_image_depends_on_its_seed_index_and_class_alone(model):
    labels = torch.arange(64) % 3
    decoding = Decoding(guidance=Schedule(2.5), top_p=Corrected(0.95))

    def run(batch):
        return torch.cat(
            [
                decode(
                    model,
                    condition_of(model, labels[i : i + batch]),
                    Noise(1, range(i, min(i + batch, 64))),
                    decoding,
                )
                for i in range(0, 64, batch)
            ]
        )

    together = run(64)
    assert torch.equal(run(7), together)
    assert torch.equal(run(1), together)
    order = torch.randperm(64)
    shuffled = decode(model, condition_of(model, labels[order]), Noise(1, order), decoding)
    assert torch.equal(shuffled, together[order])
    assert len(together.flatten(1).unique(dim=0)) > 32


def test_guidance_halves_are_dropped_when_no_longer_needed(cached):
    model, batches = cached, []
    step = model.step
    model.step = lambda tokens, condition, *rest: (
        batches.append(len(condition)),
        step(tokens, condition, *rest),
    )[1]
    decode(
        model,
        condition_of(model, LABELS),
        Noise(0, range(3)),
        Decoding(guidance=Schedule("interval(3,0,0.5)")),
    )
    guided = sum(f <= 0.5 for f in model.plan().fractions)
    assert batches == [6] * guided + [3] * (len(batches) - guided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_model_samples_under_autocast(model, dtype):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        tokens = decode(
            model, condition_of(model, LABELS), Noise(0, range(3)), Decoding(guidance=Schedule(4))
        )
    assert ((tokens >= 0) & (tokens < 11)).all()


def test_the_loss_falls_to_that_of_the_data(model):
    """Two images, one per class: the model learns to tell them apart."""
    off = ("dropout", "condition_dropout", "label_smoothing", "drop_path")
    arguments = {k: 0.0 if k in off else v for k, v in model.arguments.items()}
    model = type(model).from_config(arguments).train()
    model.set_progress(1.0)
    condition = condition_of(model, LABELS[:2])
    tokens = torch.randint(11, (2, *model.spec.tensor_shape))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200 if isinstance(model, MASKED) else 100):  # masks show a part of the tokens
        optimizer.zero_grad()
        loss = model(tokens, condition).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    drawn = decode(model.eval(), condition, Noise(0, range(2)), Decoding(temperature=Schedule(0)))
    assert torch.equal(drawn, tokens)


def test_every_parameter_is_trained(model):
    model.train()
    tokens = torch.randint(11, (16, *model.spec.tensor_shape))
    model(tokens, condition_of(model, torch.randint(3, (16,)))).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_saved_models_load_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.spec == model.spec
    assert torch.equal(
        decode(loaded.eval(), condition_of(model, LABELS), Noise(0, range(3))),
        decode(model, condition_of(model, LABELS), Noise(0, range(3))),
    )


@pytest.mark.parametrize("family", EXPORTED)
def test_unfit_specs_and_sizes_are_refused(family):
    with pytest.raises(IncompatibleTokensError, match=family.__name__):
        family(TokenSpec.latents((4, 4), 8), ["a"], **SIZES)
    spec, arguments = VARIANTS[family][0]
    with pytest.raises(UserError, match="multiple"):
        family(spec, ["a"], **{**SIZES, "num_heads": 5})
    with pytest.raises(UserError, match="expected"):
        tiny(family, spec, **arguments)(torch.zeros(2, 5, 5).long(), torch.zeros(2).long())


def test_info_describes_every_plan(model, capsys):
    describe(model)
    text = capsys.readouterr().out
    assert all(f"plan         {order}" in text for order in model.orders)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "order"), [*((family, None) for family in EXPORTED), (LlamaGen, "zipar(2)")]
)
def test_compiled_decoding_gives_the_eager_tokens(family, order):
    spec, arguments = VARIANTS[family][0]
    model = tiny(family, spec, **arguments, depth=1)
    decoding = Decoding(order and Order(order), guidance=Schedule(2))
    eager = decode(model, LABELS, Noise(0, range(3)), decoding)
    model.compile_decoding()
    assert torch.equal(decode(model, LABELS, Noise(0, range(3)), decoding), eager)


@pytest.mark.parametrize(
    ("family", "order", "passes"),
    [
        (LlamaGen, None, 256),
        (LlamaGen, "zipar(4)", 88),
        (LlamaGen, "zipar(16)", 256),
        (PAR, None, 67),
        (NAR, None, 31),
        (RAR, None, 256),
    ],
)
def test_forward_passes_of_a_grid_of_16(family, order, passes):
    model = tiny(family, TokenSpec.ids((16, 16), 11), depth=1)
    rows = []
    transformer = model.transformer
    model.transformer = lambda x, *rest, **more: (
        rows.append(x.shape),
        transformer(x, *rest, **more),
    )[1]
    decode(model, LABELS, Noise(0, range(3)), Decoding(order and Order(order), Schedule(2)))
    assert len(rows) == passes
    assert all(batch == 6 for batch, _, _ in rows)


def test_zipped_rows_of_another_order_are_refused():
    for model in (tiny(PAR, GRID), tiny(NAR, GRID), tiny(LlamaGen, GRID, order="diagonal")):
        with pytest.raises(UserError, match=re.escape(f"decodes by {model.orders[0]}, not by")):
            model.plan(Order("zipar(2)"))
    with pytest.raises(
        UserError, match="learns in order raster or diagonal or random or par, not zipar"
    ):
        tiny(LlamaGen, GRID, order="zipar(2)")


def test_zipar_of_the_whole_width_is_raster():
    model, decoding = tiny(LlamaGen, ODD), Decoding(guidance=Schedule(2))
    raster = decode(model, LABELS, Noise(0, range(3)), decoding)
    for window in (5, 8, 0):
        order = Order(f"zipar({window})")
        zipped = decode(model, LABELS, Noise(0, range(3)), decoding.changed(plan=order))
        assert torch.equal(zipped, raster)


def test_zipar_leaves_no_trace_in_a_used_cache():
    """Slots that a pass reads before they are written hold zeros again at every call."""
    model, order = tiny(LlamaGen, GRID), Order("zipar(2)")
    state = model.new_state(3, model.plan(order))
    first, again = (
        decode(model, LABELS, Noise(seed, range(3)), Decoding(order), state) for seed in (0, 1)
    )
    assert torch.equal(decode(model, LABELS, Noise(0, range(3)), Decoding(order), state), first)
    assert not torch.equal(first, again)


def test_unwritten_slots_weigh_in_unless_masked():
    """`masked` hides slots that the released rule attends to as zeros, adds none, and changes what
    is decoded."""
    model = tiny(LlamaGen, GRID)
    plans = [model.plan(Order(f"zipar(2{rule})")) for rule in ("", ",masked")]
    assert len(plans[0]) == len(plans[1])
    both = [
        (released.sees, masked.sees)
        for released, masked in zip(*(plan.passes for plan in plans), strict=True)
        if masked.sees is not None
    ]
    assert not any((masked & ~released).any() for released, masked in both)
    assert any((released & ~masked).any() for released, masked in both)
    tokens = [
        decode(model, LABELS, Noise(0, range(3)), Decoding(Order(f"zipar(2{rule})")))
        for rule in ("", ",masked")
    ]
    assert not torch.equal(*tokens)


def test_padding_of_captions_changes_nothing():
    """A caption in more rows of padding gives the same tokens' logits: rows hold no places."""
    model = tiny(LlamaGen, GRID, caption_dim=6, caption_length=5)
    longer = LlamaGen.from_config({**model.arguments, "caption_length": 8}).eval()
    state = model.state_dict()
    state["condition.null_features"] = longer.condition.null_features
    longer.load_state_dict(state)
    features, lengths = torch.randn(2, 5, 6), torch.tensor([2, 5])
    tokens = torch.randint(11, (2, 4, 4))
    short = Captions.left_padded(features, lengths)
    long = Captions.left_padded(torch.nn.functional.pad(features, (0, 0, 0, 3)), lengths)
    with torch.inference_mode():
        expected = model.teacher_forced(tokens, short)
        assert torch.allclose(longer.teacher_forced(tokens, long), expected, atol=1e-4)
    for order in ("raster", "zipar(2)", "zipar(1,masked)"):
        decoded = [
            decode(net, captions, Noise(0, range(2)), Decoding(Order(order), Schedule(1)))
            for net, captions in ((model, short), (longer, long))
        ]
        assert torch.equal(*decoded)


def test_a_model_loaded_in_half_precision_samples(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert loaded.dtype == torch.bfloat16
    condition = condition_of(loaded, LABELS)
    tokens = decode(loaded, condition, Noise(0, range(3)), Decoding(guidance=Schedule(2)))
    assert ((tokens >= 0) & (tokens < 11)).all()


def test_the_wrong_kind_of_condition_is_refused():
    with pytest.raises(UserError, match="class-conditional"):
        tiny(LlamaGen, GRID)(
            torch.zeros(2, 4, 4).long(), Captions(torch.zeros(2, 5, 6), torch.ones(2, 5).bool())
        )
    with pytest.raises(UserError, match=r"give it captions \(B, 5, 6\)"):
        tiny(PAR, GRID, caption_dim=6, caption_length=5)(
            torch.zeros(2, 4, 4).long(), torch.zeros(2).long()
        )


def test_a_generator_is_not_a_tokenizer(tmp_path):
    from vistok.tokenizers import Tokenizer

    tiny(LlamaGen, GRID).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a LlamaGen, expected a Tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
