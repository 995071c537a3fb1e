"""The benchmark of decoding: its arithmetic against a count on the way, and the command."""

import runpy

import pytest
import torch
from commands import ROOT, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vistok.decoding import Decoding, Noise, Order, Schedule, decode
from vistok.layers.cache import KVCache
from vistok.tokens import TokenSpec

ORDERS = ("raster", "zipar(2)", "zipar(2,masked)", "par(4)", "nar", "diagonal")
TINY = {"dim": 32, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "benchmarks" / "decode.py"))


@pytest.fixture(params=ORDERS)
def case(request, script):
    """A function that decodes one batch of three, the model, and what the script says it needs."""

    def made(guidance, **more):
        order = Order(request.param)
        model = script["build"](order, TokenSpec.ids((4, 4), 24), **TINY, **more)
        decoding = Decoding(order, Schedule(guidance))
        needed = script["work"](model, model.plan(order), 3, 6 if guidance != 1 else 3)
        return lambda: decode(model, torch.arange(3), Noise(0, range(3)), decoding), model, needed

    return made


def attention_flops(query, key, value, *options, **more):
    return sdpa_flop_count(query, key, value)


@pytest.mark.parametrize("guidance", [1, 2])
def test_flops_are_those_of_a_decode(case, guidance):
    loop, _, (_, flops) = case(guidance)
    # Not every PyTorch counts attention on a CPU by itself.
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        loop()
    # NAR's sharing out among its heads is bookkeeping, which the floor leaves out.
    bookkeeping = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    assert counter.get_total_flops() - bookkeeping == flops


@pytest.mark.parametrize("guidance", [1, 2])
def test_bytes_are_those_that_a_decode_reads(case, guidance, monkeypatch):
    loop, model, (read, _) = case(guidance, num_kv_heads=2)
    found = []

    def watched(method):
        def call(self, *args):
            returned = method(self, *args)
            found.extend(memory.nbytes for memory in returned)
            return returned

        return call

    for name in ("append", "write"):
        monkeypatch.setattr(KVCache, name, watched(getattr(KVCache, name)))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda linear, *_: found.append(linear.weight.nbytes))
    loop()
    assert sum(found) == read


def test_half_the_bytes_in_half_precision(script):
    model = script["build"](Order("raster"), TokenSpec.ids((4, 4), 24), **TINY)
    read, flops = script["work"](model, model.plan(), 2, 4)
    assert script["work"](model.bfloat16(), model.plan(), 2, 4) == (read // 2, flops)


def test_the_command_prints_a_row_for_each_order(capfd):
    options = "--dim 32 --depth 1 --num_heads 2 --side 4 --vocab_size 16 --batch 2 --repeats 1"
    code, out, _ = run(
        capfd, "benchmarks/decode.py", *options.split(), "--orders", f"[{', '.join(ORDERS[:2])}]"
    )
    header, _, *rows = [line.split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert code == 0 and "GB/s read" in out
    assert [row[:2] for row in rows] == [["| raster", "16"], ["| zipar(2)", "12"]]
    for row in rows:
        ms, per_second, per_pass, times = (float(cell.strip(" |")) for cell in row[4:])
        assert len(row) == len(header)
        assert ms * per_second == pytest.approx(1000, rel=0.01)
        assert per_pass * int(row[1]) == pytest.approx(2 * ms, rel=0.02)
        assert times > 1


def test_an_order_that_does_not_fit_ends_in_one_line(capfd):
    code, _, err = run(capfd, "benchmarks/decode.py", "--orders", "[par(4)]", "--side", 5)
    assert code == 2 and err.startswith("error: order 'par(4)': ") and err.count("\n") == 1


@pytest.mark.slow
def test_the_compiled_loop_has_columns_and_the_same_tokens(capfd):
    options = "--dim 32 --depth 1 --num_heads 2 --side 2 --vocab_size 16 --batch 2 --repeats 1"
    more = ("--orders", "[raster]", "--compile", "true")
    code, out, _ = run(capfd, "benchmarks/decode.py", *options.split(), *more)
    assert code == 0 and "compiled: ms per image" in out and "differ" not in out
