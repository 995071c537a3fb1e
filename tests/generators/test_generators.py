"""Every exported generator, in tiny form."""

import inspect

import pytest
import torch

import vistok
from vistok.decoding import Decoding, Noise, Schedule, decode, sample_categorical
from vistok.decoding.sampling import Sampling
from vistok.errors import CheckpointError, IncompatibleTokensError, UserError
from vistok.generators import Generator, LlamaGen
from vistok.tokens import TokenSpec

SPECS = [
    TokenSpec.ids((4, 4), 11),
    TokenSpec.ids((3, 5), 11),
    TokenSpec.ids((9,), 11, ordered=True),
]
SIZES = {LlamaGen: {"dim": 32, "depth": 2, "num_heads": 4}}
EXPORTED = [
    c
    for c in (getattr(vistok, name) for name in vistok.__all__)
    if inspect.isclass(c) and issubclass(c, Generator) and c is not Generator
]


def tiny(family: type[Generator], spec: TokenSpec, **more) -> Generator:
    """A model with random weights everywhere, so that no logit is trivially zero."""
    model = family(spec, ["a", "b", "c"], **{**SIZES[family], **more}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(
    params=[(f, s) for f in EXPORTED for s in SPECS], ids=lambda p: f"{p[0].__name__}-{p[1]}"
)
def model(request):
    return tiny(*request.param)


CONDITION = torch.tensor([0, 2, 1])


def full_logits(model, tokens, condition):
    """The forward pass of training, all rows at once."""
    rows = model.plan().training
    x = model.embed(tokens.flatten(1), condition, rows)
    mask = None if rows.is_causal else rows.mask
    hidden = model.transformer(x, model.positions(rows), mask=mask, is_causal=rows.is_causal)
    return model.head.logits(model.norm(rows.gather(hidden)))


@torch.inference_mode()
def test_cached_steps_give_the_logits_of_the_full_forward(model):
    tokens = torch.randint(11, (3, *model.spec.tensor_shape))
    plan = model.plan()
    state = model.new_state(3, plan)
    steps = [
        model.head.logits(model.step(tokens.flatten(1), CONDITION, fed, state))
        for fed in plan.passes
    ]
    full = full_logits(model, tokens, CONDITION)
    assert torch.allclose(torch.cat(steps, dim=1), full, atol=1e-5, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy(full.transpose(1, 2), tokens.flatten(1))
    assert torch.allclose(model(tokens, CONDITION).loss, loss, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("guidance", ["1", "linear(1,3)", "interval(3,0,0.4)"])
def test_the_loop_gives_the_tokens_of_a_reference_without_cache(model, guidance):
    decoding = Decoding(guidance=Schedule(guidance), temperature=Schedule("linear(1.2,0.8)"))
    fast = decode(model, CONDITION, Noise(5, range(3)), decoding)

    n = model.spec.num_tokens
    tokens, uniform = torch.zeros(3, n, dtype=torch.long), Noise(5, range(3)).uniform(n)
    for t in range(n):
        shaped = tokens.view(3, *model.spec.tensor_shape)
        logits = full_logits(model, shaped, CONDITION)[:, t]
        null = full_logits(model, shaped, model.null_condition(CONDITION))[:, t]
        logits = null + Schedule(guidance)(t / n) * (logits - null)
        sampling = Sampling(Schedule("linear(1.2,0.8)")(t / n))
        tokens[:, t] = sample_categorical(logits, uniform[:, t], sampling)
    assert torch.equal(fast.flatten(1), tokens)


def test_a_repeated_call_is_clean(model):
    decoding = Decoding(guidance=Schedule(2), top_k=5)
    plan = model.plan()
    state = model.new_state(6, plan)
    memory = state.memory.data_ptr()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first = decode(model, CONDITION, Noise(0, range(3)), decoding, state)
    decode(
        model,
        CONDITION.flip(0),
        Noise(9, range(3)),
        Decoding(guidance=Schedule("interval(2,0,0.5)")),
        state,
    )
    again = decode(model, CONDITION, Noise(0, range(3)), decoding, state)
    assert torch.equal(first, again)
    assert state.memory.data_ptr() == memory
    assert set(model.state_dict()) == set(before)


def test_an_image_depends_on_its_seed_index_and_class_alone(model):
    labels = torch.arange(64) % 3
    decoding = Decoding(guidance=Schedule(2.5), top_p=0.95)

    def run(batch):
        return torch.cat(
            [
                decode(
                    model, labels[i : i + batch], Noise(1, range(i, min(i + batch, 64))), decoding
                )
                for i in range(0, 64, batch)
            ]
        )

    together = run(64)
    assert torch.equal(run(7), together)
    assert torch.equal(run(1), together)
    order = torch.randperm(64)
    shuffled = decode(model, labels[order], Noise(1, order), decoding)
    assert torch.equal(shuffled, together[order])
    assert len(together.flatten(1).unique(dim=0)) == 64


def test_guidance_halves_are_dropped_when_no_longer_needed(model):
    batches = []
    step = model.step
    model.step = lambda tokens, condition, *rest: (
        batches.append(len(condition)),
        step(tokens, condition, *rest),
    )[1]
    decode(model, CONDITION, Noise(0, range(3)), Decoding(guidance=Schedule("interval(3,0,0.5)")))
    guided = sum(f <= 0.5 for f in model.plan().fractions)
    assert batches == [6] * guided + [3] * (len(batches) - guided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_model_samples_under_autocast(model, dtype):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        tokens = decode(model, CONDITION, Noise(0, range(3)), Decoding(guidance=Schedule(4)))
    assert ((tokens >= 0) & (tokens < 11)).all()


def test_the_loss_falls_to_that_of_the_data(model):
    """Two images, one per class: the model learns to tell them apart."""
    model = tiny(type(model), model.spec, dropout=0.0, condition_dropout=0.0).train()
    tokens = torch.randint(11, (2, *model.spec.tensor_shape))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens, CONDITION[:2]).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    drawn = decode(
        model.eval(), CONDITION[:2], Noise(0, range(2)), Decoding(temperature=Schedule(0))
    )
    assert torch.equal(drawn, tokens)


def test_every_parameter_is_trained(model):
    model.train()
    tokens = torch.randint(11, (16, *model.spec.tensor_shape))
    model(tokens, torch.randint(3, (16,))).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_saved_models_load_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.spec == model.spec
    assert torch.equal(
        decode(loaded.eval(), CONDITION, Noise(0, range(3))),
        decode(model, CONDITION, Noise(0, range(3))),
    )


@pytest.mark.parametrize("family", EXPORTED)
def test_unfit_specs_and_sizes_are_refused(family):
    with pytest.raises(IncompatibleTokensError, match=family.__name__):
        family(TokenSpec.latents((4, 4), 8), ["a"], **SIZES[family])
    with pytest.raises(UserError, match="multiple"):
        family(SPECS[0], ["a"], **{**SIZES[family], "num_heads": 5})
    with pytest.raises(UserError, match="expected"):
        tiny(family, SPECS[0])(torch.zeros(2, 5, 5, dtype=torch.long), torch.zeros(2).long())


@pytest.mark.slow
def test_compiled_decoding_gives_the_eager_tokens():
    model = tiny(LlamaGen, TokenSpec.ids((2, 3), 11), depth=1)
    decoding = Decoding(guidance=Schedule(2))
    eager = decode(model, CONDITION, Noise(0, range(3)), decoding)
    model.compile_decoding()
    assert torch.equal(decode(model, CONDITION, Noise(0, range(3)), decoding), eager)


def test_a_generator_is_not_a_tokenizer(tmp_path):
    from vistok.tokenizers import Tokenizer

    tiny(LlamaGen, SPECS[0]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a LlamaGen, expected a Tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
