"""Which tokens of scales stay when a part of an image is decoded anew."""

import torch

from vistok.decoding import Decoding, Given, Noise, Schedule, decode
from vistok.decoding.editing import box, kept_of_scales
from vistok.decoding.sampling import gumbel
from vistok.generators import VAR
from vistok.generators.smooth import Smooth
from vistok.quantizers import VQ, MultiScale


def test_boxes_round_half_to_even():
    assert box((4, 4), 0.1, 0.2, 0.7, 0.8).nonzero().tolist() == [
        [row, column] for row in (0, 1, 2) for column in (1, 2)
    ]
    inside, outside = (box((2, 10), 0.0, 0.25, 1.0, 0.45, outside=o) for o in (False, True))
    assert inside[0].nonzero().flatten().tolist() == [2, 3]
    assert torch.equal(outside, ~inside)


def test_coarse_scales_stay_whole_and_finer_ones_by_half():
    mask = box((8, 8), 0.0, 0.0, 1.0, 0.5)
    kept = kept_of_scales(mask, [(1, 1), (1, 3), (2, 2), (8, 8)])
    assert kept[:4].all()
    assert kept[4:8].tolist() == [True, False, True, False]
    assert torch.equal(kept[8:].view(8, 8), mask)


@torch.inference_mode()
def test_kept_tokens_stay_and_the_others_see_them():
    codes = MultiScale(VQ(11, 3, l2_normalise=False), (1, 2, 4))
    torch.nn.init.normal_(codes.quantizer.embedding.weight)
    model = VAR(codes.spec((4, 4)), ["a", "b"], codes, dim=24, depth=1, num_heads=2).eval()
    torch.nn.init.normal_(model.head.linear.weight)
    labels, decoding = torch.tensor([0, 1]), Decoding(guidance=Schedule("linear(1,3)"))
    source = torch.randint(11, (2, model.spec.num_tokens))
    kept = kept_of_scales(box((4, 4), 0.0, 0.0, 0.5, 1.0), codes.scales)
    edited, free = (
        decode(model, labels, Noise(0, range(2)), decoding, given=given)
        for given in (Given(source, kept), None)
    )
    assert torch.equal(edited[:, kept], source[:, kept])
    assert not torch.equal(edited[:, ~kept], free[:, ~kept])
    whole = Given(codes.quantizer.decode(source), torch.ones_like(kept))
    smooth = decode(Smooth(model), labels, Noise(0, range(2)), decoding, given=whole)
    torch.testing.assert_close(smooth, codes.decode(source))


@torch.inference_mode()
def test_smooth_codes_are_means_that_sharpen_with_the_scale():
    codes = MultiScale(VQ(11, 3, l2_normalise=False), (1, 2, 4))
    torch.nn.init.normal_(codes.quantizer.embedding.weight)
    model = VAR(codes.spec((4, 4)), ["a"], codes, dim=24, depth=1, num_heads=2).eval()
    head, logits = Smooth(model).head, torch.randn(5, 16, 11)
    noise, sampling = torch.rand(5, 16, 11), Decoding().sampling(0.0)

    table = codes.quantizer.embedding.weight
    apart = [
        (
            head.mean(logits, noise, sampling, progress)
            - table[((logits * (1 + progress)).double() + gumbel(noise)).argmax(-1)]
        )
        .square()
        .mean()
        for progress in (0.0, 0.5, 1.0)
    ]
    assert apart[0] > apart[1] > apart[2]
    few = Decoding.from_dict({"top_k": "1"}).sampling(0.0)
    torch.testing.assert_close(head.mean(logits, noise, few, 0.0), table[logits.argmax(-1)])
