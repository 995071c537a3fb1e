"""Classes and orders that are not vistok's are named by checkpoints and options as its own are."""

import subprocess
import sys

import pytest
import torch

from vistok import ConvTokenizer, Order, Tokenizer
from vistok.decoding import orders
from vistok.errors import UserError
from vistok.quantizers import FSQ

SIZES = {"channels": 8, "channel_multipliers": (1,), "num_res_blocks": 1, "z_channels": 8}
SIZES |= {"image_size": 16, "patch_size": 4, "attention": False, "groups": 4}


def test_an_own_class_is_found_once_it_is_defined(tmp_path):
    class OwnQuantizer(FSQ):
        """As its parent."""

    class OwnTokenizer(ConvTokenizer):
        """As its parent."""

    model = OwnTokenizer(OwnQuantizer([4, 4]), **SIZES).eval()
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path).eval()
    assert type(again) is OwnTokenizer and type(again.quantizer) is OwnQuantizer
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.encode(images), model.encode(images))
    assert again.fingerprint() == model.fingerprint()
    code = f"from vistok import Tokenizer; Tokenizer.from_pretrained({str(tmp_path)!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a class of your own is found once its module is imported" in other.stderr


def test_a_name_of_vistoks_stays_vistoks(tmp_path):
    own = type("FSQ", (FSQ,), {})
    ConvTokenizer(own([4, 4]), **SIZES).save_pretrained(tmp_path)
    assert type(Tokenizer.from_pretrained(tmp_path).quantizer) is FSQ


def test_an_own_order_is_spelt_like_others(monkeypatch):
    monkeypatch.setattr(orders, "ORDERS", dict(orders.ORDERS))

    @orders.order(trained="raster")
    def backwards(shape, condition_rows: int = 1, step: int = 1):
        return orders.Plan("backwards", shape, orders.raster(shape, condition_rows).passes[::-step])

    order = Order("backwards(1)")
    assert order.trained == "raster" and Order("raster").trained == "raster"
    assert order((2, 2)) is order((2, 2)), "plans are kept"
    assert [fed.predict.tolist() for fed in order((2, 2)).passes] == [[3], [2], [1], [0]]
    with pytest.raises(UserError, match="step must be a whole number"):
        Order("backwards(x)")
    with pytest.raises(UserError, match=r"order 'raster' is that of vistok\.decoding\.orders"):

        @orders.order()
        def raster(shape, condition_rows: int = 1): ...
