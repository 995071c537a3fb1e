"""Speed: what is counted against closed forms and a second count, for every kind of generator."""

import inspect
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import sdpa_flop_count

import vistok
from vistok import ImagePipeline, TokenSpec
from vistok.decoding import Decoding, Noise, Order, Sampler, Schedule, decode
from vistok.errors import UserError
from vistok.generators import (
    MAR,
    NAR,
    PAR,
    RAR,
    VAR,
    XAR,
    FlowAR,
    Generator,
    LlamaGen,
    MaskGIT,
    NextScaleLlama,
)
from vistok.heads import DiffusionHead, DimensionWiseHead, FlowHead, FlowTransformerHead
from vistok.quantizers import FSQ, VQ, DimensionWise, Gaussian, MultiScale
from vistok.roofline import Rates, Work, count_work, measured_rates
from vistok.speed import Case, Speed, conditions, cost, in_turn, measure, measure_tokenizer, table
from vistok.tokenizers import ConvTokenizer, KLAutoencoder, KLTokenizer

SIZES = {"dim": 32, "depth": 2, "num_heads": 4}
SMALL = {"width": 32, "depth": 1}
IDS, LATENTS, DIGITS = (
    TokenSpec.ids((4, 4), 24),
    TokenSpec.latents((4, 4), 3),
    DimensionWise(3, 8).spec((4, 4)),
)
CODES = MultiScale(VQ(11, 3, l2_normalise=False), (1, 2, 4))
TEXT = {"caption_dim": 6, "caption_length": 5}
PROMPTS = {"text_vocab_size": 9, "caption_length": 4}
GUIDED = Decoding(guidance=Schedule("linear(1,3)"), steps=Schedule("linear(6,3)"))
# Of every kind, with every kind of head.
CASES = {
    "LlamaGen": (LlamaGen, IDS, {}),
    "LlamaGen, grouped": (LlamaGen, IDS, {"num_kv_heads": 2, "order": "diagonal"}),
    "LlamaGen of captions": (LlamaGen, IDS, TEXT),
    "PAR": (PAR, IDS, {}),
    "NAR": (NAR, IDS, {}),
    "MaskGIT": (MaskGIT, IDS, {}),
    "MaskGIT, U-ViT": (MaskGIT, IDS, {"backbone": "uvit"}),
    "RAR": (RAR, IDS, {}),
    "VAR": (VAR, CODES.spec((4, 4)), {"codes": CODES}),
    "NextScaleLlama": (NextScaleLlama, CODES.spec((4, 4)), {"codes": CODES}),
    "NextScaleLlama of prompts": (
        NextScaleLlama,
        CODES.spec((4, 4)),
        {"codes": CODES, **PROMPTS},
    ),
    "MAR": (MAR, LATENTS, {"head": DiffusionHead(**SMALL), "buffer": 2}),
    "MAR, flow": (MAR, LATENTS, {"head": FlowHead(**SMALL), "buffer": 2}),
    "TokenBridge": (MAR, DIGITS, {"head": DimensionWiseHead(num_heads=2, **SMALL), "buffer": 2}),
    "xAR": (XAR, LATENTS, {"order": "cells(2)"}),
    "FlowAR": (FlowAR, LATENTS, {"head": FlowTransformerHead(64, 1), "scales": (1, 2, 4)}),
    "FlowAR, across": (
        FlowAR,
        LATENTS,
        {"head": FlowTransformerHead(64, 1, cross=True), "scales": (1, 2, 4)},
    ),
    "FlowAR, diffusion": (FlowAR, LATENTS, {"head": DiffusionHead(**SMALL), "scales": (1, 2, 4)}),
}


class NoDecoder(nn.Module):
    """Stands for a tokenizer where tokens alone count."""

    text_shape = None

    def __init__(self, spec: TokenSpec):
        super().__init__()
        self.spec = spec

    def decode(self, tokens, text=None, noise=None):
        return tokens


def pipeline_of(name: str) -> ImagePipeline:
    torch.manual_seed(0)
    family, spec, arguments = CASES[name]
    model = family(spec, ["a", "b", "c"], **SIZES | arguments)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return ImagePipeline(NoDecoder(spec), model, GUIDED)


def drawing(pipeline: ImagePipeline, batch: int, decoding: Decoding):
    """A function that draws the tokens of a batch, and the generator."""
    condition = conditions(pipeline.generator, batch)
    run = pipeline.sample_tokens
    return lambda: run(condition, 0, range(batch), decoding), pipeline.generator


class Calls(TorchFunctionMode):
    """Counts the functions that Python calls, where the counter sees what becomes of them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.read = self.multiplied = 0
        self.held = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}

    def product(self, made, inner, *operands):
        self.multiplied += 2 * made.numel() * inner
        self.read += sum(t.nbytes for t in operands)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func is F.linear:
            x, weight = args[:2]
            self.product(made, x.shape[-1], weight)
        elif func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            held = [t for t in args if t.data_ptr() in self.held]
            self.product(made, args[0].shape[-1], *held)
        elif func is torch.baddbmm:
            _, x, weight = args
            self.product(made, x.shape[-1], weight)
        elif func is torch.einsum:  # NAR's sharing out among its heads, heads x s x r x b d
            mixing, hidden = args[1:]
            if mixing.shape[-1] > 1:  # one row is not shared out by a product
                self.multiplied += 2 * mixing.numel() * hidden[0, :, 0].numel()
        elif func is torch.conv2d or func is F.conv2d:
            weight = args[1]
            self.product(made, weight[0].numel(), weight)
        elif func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            self.multiplied += sdpa_flop_count(query.shape, key.shape, value.shape)
            self.read += key.nbytes + value.nbytes
        return made


def test_every_generator_is_among_the_cases():
    exported = (getattr(vistok, name) for name in vistok.__all__)
    families = {c for c in exported if inspect.isclass(c) and issubclass(c, Generator)}
    assert families - {Generator} == {family for family, *_ in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_the_count_is_that_of_the_functions_called(name):
    run, model = drawing(pipeline_of(name), 3, GUIDED)
    run()  # what is made once, as embedded times, is made
    work, tokens = count_work(run, model)
    with torch.inference_mode(), Calls(model) as calls:
        expected = run()
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-3)
    assert (work.read, work.multiplied) == (calls.read, calls.multiplied)


@pytest.mark.parametrize("guidance", [1, 2])
@pytest.mark.parametrize("order", ["raster", "zipar(2)", "zipar(2,masked)", "par(4)", "diagonal"])
def test_the_count_of_a_llama_is_its_closed_form(order, guidance):
    """Each pass reads the weights and the keys and values that it sees; rows fed go through the
    blocks and attend to these, predicted positions through the head, once for both halves."""
    learned = "raster" if order.startswith("zipar") else order
    model = LlamaGen(IDS, ["a", "b", "c"], learned, **SIZES, num_kv_heads=2).eval()
    plan, sequences = model.plan(Order(order)), 3 * guidance
    blocks, head = (
        sum(p.numel() for p in part.parameters() if p.ndim == 2)
        for part in (model.blocks, model.head)
    )
    filled = seen = pairs = 0
    for fed in plan.passes:
        filled += fed.rows
        end = filled if fed.sees is None else fed.sees.shape[1]
        seen, pairs = seen + end, pairs + fed.rows * end
    width = 2 * SIZES["depth"] * SIZES["dim"]  # of keys and values in all layers
    read = len(plan) * (blocks + head) + sequences * seen * width // 2  # of half as many heads
    multiplied = sequences * (filled * blocks + pairs * width) + 3 * 16 * head
    decoding = Decoding(Order(order), Schedule(guidance))
    labels = torch.arange(3)
    for dtype in (torch.float32, torch.bfloat16):
        nn.Module.to(model, dtype)  # diffusers' own `to` warns of any dtype
        run = lambda: decode(model, labels, Noise(0, range(3)), decoding)  # noqa: E731
        assert count_work(run, model)[0] == Work(dtype.itemsize * read, 2 * multiplied)


def test_guidance_doubles_the_products_of_the_trunk_and_not_the_weights_read():
    pipeline = pipeline_of("MaskGIT")
    off, on = (
        count_work(*drawing(pipeline, 3, Decoding(guidance=Schedule(scale))))[0] for scale in (1, 2)
    )
    model = pipeline.generator
    passes, head = 8, model.head.linear.weight.numel()
    once = passes * 3 * 16 * 2 * head
    assert on.multiplied - once == 2 * (off.multiplied - once)
    values = passes * 3 * 17 * 2 * SIZES["depth"] * SIZES["dim"] * 4  # keys and values of 17 rows
    assert on.read == off.read + values


@pytest.mark.parametrize(("name", "sampler"), [("MAR", "ddpm"), ("MAR, flow", None), ("xAR", None)])
def test_each_step_of_a_head_reads_its_network_again(name, sampler):
    pipeline = pipeline_of(name)
    settings = Decoding(sampler=sampler and Sampler(sampler), guidance=Schedule(2))
    by_steps = [settings.changed(steps=Schedule(steps)) for steps in (4, 6, 8)]
    counted = [count_work(*drawing(pipeline, 2, decoding))[0] for decoding in by_steps]
    few, some, many = (cost(pipeline.generator, decoding).calls for decoding in by_steps)
    assert many - some == some - few == 2 * len(by_steps[0].plan_of(pipeline.generator))
    reads = [work.read for work in counted]
    if name == "xAR":  # modulations are made for all steps at once, whose number costs no reads
        step = reads[1] - reads[0]
        assert step == reads[2] - reads[1] > 0
    else:
        net = pipeline.generator.head.net
        layers = [net.input, net.output, *(block.fc1 for block in net.blocks)]
        layers += [block.fc2 for block in net.blocks]
        step = sum(layer.weight.nbytes for layer in layers)
        assert reads[1] - reads[0] == (some - few) * step == reads[2] - reads[1]


def test_the_work_of_a_batch_grows_as_it_does_but_for_the_weights():
    one, two, four = (
        count_work(*drawing(pipeline_of("LlamaGen"), batch, GUIDED))[0] for batch in (1, 2, 4)
    )
    assert 4 * one.multiplied == 2 * two.multiplied == four.multiplied
    assert four.read - two.read == 2 * (two.read - one.read)
    assert two.read < 2 * one.read


def test_the_count_sees_numbers_once_and_copies_of_weights():
    layer = nn.Linear(8, 4, bias=True)
    x, shared = torch.randn(3, 8), torch.randn(2, 1, 5, 8).expand(2, 4, 5, 8)

    def copied():
        weight = layer.weight.to(torch.bfloat16).t().contiguous()
        return x.bfloat16() @ weight

    assert count_work(lambda: layer(x), layer)[0] == Work(4 * 32, 2 * 3 * 32)
    assert count_work(copied, layer)[0] == Work(2 * 32, 2 * 3 * 32)
    assert count_work(lambda: x @ x.T, layer)[0] == Work(0, 2 * 3 * 3 * 8)
    work, _ = count_work(lambda: F.scaled_dot_product_attention(shared, shared, shared), layer)
    assert work == Work(2 * 4 * 2 * 5 * 8, 2 * 2 * 2 * 4 * 5 * 5 * 8)


@pytest.mark.slow
def test_a_compiled_model_counts_as_it_was():
    pipeline = pipeline_of("LlamaGen")
    run, model = drawing(pipeline, 2, GUIDED)
    expected = count_work(run, model)[0]
    model.compile_decoding()
    run()
    assert count_work(run, model)[0] == expected


@pytest.mark.parametrize("name", CASES)
def test_calls_are_those_of_the_network_that_draws(name, monkeypatch):
    """Counted on the way by what each head calls once for a set of tokens."""
    pipeline = pipeline_of(name)
    model, head = pipeline.generator, pipeline.generator.head
    found = cost(model, GUIDED)
    plan = GUIDED.plan_of(model)
    assert found.passes == len(plan)
    where, name = {
        "CategoricalHead": (head, "logits"),
        "DiffusionHead": (getattr(head, "net", None), "denoised"),
        "FlowHead": (getattr(head, "net", None), "denoised"),
        "DimensionWiseHead": (head, "transformer"),
        "FlowTransformerHead": (head, "forward"),
        "EntityFlow": (model, "transformer"),
    }[type(head).__name__]
    inner, seen = getattr(where, name), []

    def watched(*args, **kwargs):
        seen.append(args)
        return inner(*args, **kwargs)

    monkeypatch.setattr(where, name, watched)
    drawing(pipeline, 2, GUIDED)[0]()
    # xAR feeds each finished entity but the last, too.
    again = len(plan) - 1 if isinstance(model, XAR) else 0
    assert len(seen) == found.calls + again
    if type(head).__name__ == "CategoricalHead":
        assert found.rows == sum(args[0].shape[1] for args in seen)


def test_figures_follow_from_each_other():
    pipeline = pipeline_of("MAR")
    rates = Rates(reading=1e9, multiplying=1e11)
    case = Case("mar(16)", pipeline, 4)
    work = Work(2 * 10**9, 10**11)
    speed = Speed(case, cost(pipeline.generator, GUIDED), work, 4.0, 1.0, rates)
    assert work.floor(rates) == 2 and work.bound(rates) == "reads"
    assert Work(1, 10**12).bound(rates) == "products"
    assert speed.images_per_second == 1 and speed.images_per_second_decoded == 0.8
    assert speed.times_the_floor == 2 and speed.tokens == 16
    assert speed.parameters == pipeline.generator.num_parameters()
    row = speed.row()
    assert row["ms per pass"] * row["passes"] == row["ms per image"] * 4 == 4000
    assert row["decoder, ms per image"] == 250 and row["floor, ms per image"] == 500
    header, rule, line = table([row]).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|") == len(row) + 1
    assert rates.best(Rates(2e9, 1e10)) == Rates(2e9, 1e11)


def test_rows_take_turns_and_the_first_round_does_not_count():
    order, numbers = [], iter([100, 100, 1, 20, 3, 40, 2, 30])

    def run(name):
        return lambda: (order.append(name), (next(numbers),))[1]

    found = in_turn([run("a"), run("b")], 3, lambda: order.append("between"))
    assert order == ["between", "a", "b"] * 4
    assert found == [(statistics.median([1, 3, 2]),), (30,)]


def test_cases_of_any_kind_are_measured(monkeypatch):
    rates = Rates(1e10, 1e11)
    monkeypatch.setattr("vistok.speed.measured_rates", lambda device, dtype: rates)
    names = ["LlamaGen of captions", "NextScaleLlama of prompts", "TokenBridge"]
    cases = [Case(name, pipeline_of(name), batch) for name in names for batch in (1, 2)]
    adaptive = GUIDED.changed(plan=Order("zipar(2,adaptive)"))
    cases.append(Case("adaptive", pipeline_of("LlamaGen"), 3, adaptive))
    for case, speed in zip(cases, measure(cases, repeats=1), strict=True):
        assert speed.case is case and speed.rates == rates
        assert all(math.isfinite(v) and v > 0 for v in speed.row().values() if type(v) is not str)
        assert case.pipeline._states == {}  # what was there stays
    assert 14 <= speed.cost.passes <= 16
    assert speed.row()["ms per pass"] * speed.cost.passes == pytest.approx(
        speed.row()["ms per image"]
    )


def test_a_tokenizer_alone_is_measured():
    vae = KLAutoencoder(3, [8, 8], layers_per_block=1, norm_groups=4)
    for tokenizer in (
        ConvTokenizer(FSQ([4, 4]), 8, 8, (1, 1), z_channels=4, num_res_blocks=1),
        KLTokenizer(Gaussian(3), vae, 8),
    ):
        one, two = measure_tokenizer(tokenizer.eval(), [1, 2], repeats=1)
        assert (one.batch, two.batch) == (1, 2)
        row = two.row()
        for part in ("encoder", "decoder"):
            each = row[f"{part}, ms per image"] * row[f"{part}, images/s"]
            assert each == pytest.approx(1000)


def test_mistakes_are_told_in_one_line():
    pipeline = pipeline_of("LlamaGen")
    with pytest.raises(UserError, match="repeats 0 must be at least 1"):
        measure([Case("", pipeline)], 0)
    with pytest.raises(UserError, match="batch sizes 4, 0: each must be at least 1"):
        measure([Case("", pipeline, 4), Case("", pipeline, 0)])
    with pytest.raises(UserError, match="not by nar"):
        measure([Case("", pipeline, 1, Decoding(Order("nar")))])


def test_rates_are_of_the_device():
    rates = measured_rates(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.reading < 1e13 and 1e8 < rates.multiplying < 1e16
